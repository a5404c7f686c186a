"""Output heads: `LMHead`, and how one is read from a Hugging Face model and verified against its own logits."""

from unisd_kernels.heads.head import LMHead

__all__ = ["LMHead"]
