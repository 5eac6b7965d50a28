"""Builds `data/wan-nano`: text encoder, VAE, experts, then the pipeline folder. `training/README.md` has the commands."""
