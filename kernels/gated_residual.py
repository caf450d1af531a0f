from dit_fast.kernels import reference


def gated_residual(x, branch, gate, bias=None, kernels="auto"):
    return reference.gated_residual(x, branch, gate, bias)


def gated_residual_adaln(x, branch, gate, shift, scale, bias=None, eps=1e-6, kernels="auto"):
    return reference.gated_residual_adaln(x, branch, gate, shift, scale, bias, eps)
