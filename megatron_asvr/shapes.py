"""The legend of dimensions that tensor names carry, and one check against it.

A name such as ``hidden_SBH`` lists the logical dimensions in order:

    B  samples (rows) of a micro-batch         S  positions of a sequence
    H  width of the language model             T  text vocabulary
    I  images of a micro-batch                 N  patches of one image
    P  image patches of a micro-batch (I * N)  C  channels, or width of a code vector
    M  positions with a visual target          D  depths (levels) of the visual tokenizer
    E  width of the visual head                K  codebook size of one depth
    F  width of an encoder feature             L  layers
    A  attention heads                         X  positions with a text target

Shapes are global; where a tensor holds one rank's share, the comment beside it says so.
"""

from torch import Tensor

from megatron_asvr.errors import AsvrError


def check_shape(name: str, x: Tensor, dims: str, **sizes: int) -> Tensor:
    """Return ``x`` after checking its rank and the sizes of its named dimensions.

    Args:
        name: how the tensor is called in the error message.
        x: any tensor.
        dims: space-separated dimension letters, e.g. ``"S B H"``.
        **sizes: wanted size of some of the letters.

    Raises:
        AsvrError: the number of dimensions or one of the sizes differs.
    """
    letters = dims.split()
    got = dict(zip(letters, x.shape, strict=False))
    wrong = {k: v for k, v in sizes.items() if got.get(k) != v}
    if len(letters) != x.dim() or wrong:
        wanted = " ".join(f"{d}={sizes[d]}" if d in sizes else d for d in letters)
        raise AsvrError(f"{name} has shape {tuple(x.shape)}; wanted [{wanted}]")
    return x
