from dit_fast.kernels import reference


def adaln_modulate(x, shift, scale, eps=1e-6, kernels="auto"):
    return reference.adaln_modulate(x, shift, scale, eps)
