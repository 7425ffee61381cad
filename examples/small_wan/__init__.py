"""A video diffusion model small enough to train on two cores: data, model, rectified flow and checkpoints."""
