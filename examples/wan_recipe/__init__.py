"""Parts of ``examples/finetune_wan.py``: clips, parallelism and what is saved."""
