"""How fast are a training step and a sampling step, beside the plain model and the peers?"""
