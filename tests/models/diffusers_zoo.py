"""Every video denoiser of diffusers, with image models as negatives: one registry."""

from __future__ import annotations

from models import zoo_cog, zoo_factorised, zoo_hunyuan, zoo_packed, zoo_wan
from models.zoo_entry import Entry

DIFFUSERS_ZOO: dict[str, Entry] = {
    **zoo_wan.ENTRIES,
    **zoo_hunyuan.ENTRIES,
    **zoo_cog.ENTRIES,
    **zoo_packed.ENTRIES,
    **zoo_factorised.ENTRIES,
}
