"""Decode of implementation "triton" by either route: see `pallas_kernels.triton_routes`."""

from pallas_kernels import triton_routes


def unsupported(*operands, scale, block_sizes) -> str | None:
    """Why no route can run the call, or None."""
    module, reasons = triton_routes.choose(("decode",), ".decode", *operands, scale=scale, block_sizes=block_sizes)
    return triton_routes.refusal(reasons) if module is None else None


def decode(*operands, scale, block_sizes):
    """Returns the output (B, T, N, Hv)."""
    options = dict(scale=scale, block_sizes=block_sizes)
    return triton_routes.choose(("decode",), ".decode", *operands, **options)[0].decode(*operands, **options)
