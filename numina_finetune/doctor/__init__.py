"""``numina-finetune doctor``: what on this machine would stand in a run's way, each finding with its fix."""
