"""Flash attention without a GPU: transformers' own code runs, and only the kernels are computed by sdpa."""

from itertools import pairwise

import torch
import transformers.modeling_flash_attention_utils as flash
from torch.nn.functional import scaled_dot_product_attention


def _attend(q, k, v, scale, window_size):
    """Return the full attention of one segment; q is [tokens, heads, width]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None
    if window_size != (-1, -1):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = (distance <= window_size[0]) & (-distance <= window_size[1])
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


class FakeKernels:
    """Functions with the signatures of flash-attn 2 or 3, which keep what they were called with.

    Attributes:
        calls: the bounds of the segments, as a list, and the longest, of each call with segments; None of others.
    """

    def __init__(self, version=2):
        self.calls = []
        # The kernels of flash-attn 3 have no dropout.
        self.varlen = self._varlen2 if version == 2 else self._varlen3
        self.plain = self._plain2 if version == 2 else self._plain3

    def install(self, monkeypatch):
        """Make transformers take these functions for those of any installed flash attention."""
        functions = (self.plain, self.varlen, None, flash._pad_input, flash._unpad_input)
        if not hasattr(flash, "_flash_with_kvcache_fn"):  # transformers 4
            functions = functions[:2] + functions[3:]
        monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
        for name in ("_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn"):
            monkeypatch.setattr(flash, name, None)
        if hasattr(flash, "_loaded_implementation"):
            monkeypatch.setattr(flash, "_loaded_implementation", None)

    def _run(self, q, k, v, bounds, longest, scale, causal, window_size):
        assert not causal and bounds.dtype == torch.int32 and q.dim() == 3
        edges = bounds.tolist()
        assert edges[0] == 0 and edges[-1] == len(q) and int(longest) == max(bounds.diff().tolist())
        self.calls.append((edges, int(longest)))
        parts = [slice(a, b) for a, b in pairwise(edges)]
        return torch.cat([_attend(q[part], k[part], v[part], scale, window_size) for part in parts])

    def _whole(self, q, k, v, scale, causal, window_size):
        assert not causal and q.dim() == 4
        self.calls.append(None)
        return torch.stack([_attend(*row, scale, window_size) for row in zip(q, k, v, strict=True)])

    def _varlen2(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and torch.equal(cu_seqlens_q, cu_seqlens_k) and int(max_seqlen_q) == int(max_seqlen_k)
        return self._run(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size)

    def _varlen3(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(max_seqlen_q) == int(max_seqlen_k)
        return self._run(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size)

    def _plain2(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        deterministic=False,
    ):  # fmt: skip
        return self._whole(q, k, v, softmax_scale, causal, window_size)

    def _plain3(
        self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):
        return self._whole(q, k, v, softmax_scale, causal, window_size)
