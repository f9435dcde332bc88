"""The one transformer behind every family: pre-norm blocks, RMSNorm, rotary embedding, grouped KV heads, SwiGLU.

A family file (`llada.py`, ...) maps a published ``config.json`` onto `ModelSpec` and published tensor names onto the
parameters below; nothing here knows a family. The pieces of a block are methods of their own because a cache policy
may compose a layer from them; `Transformer.forward` is their plain composition over all rows, without a cache: the
reference that every adapter and every policy's exact configuration is tested against, and the training path.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dcache.kernels.attend import attend
from dcache.kernels.product import add_product, gated_product, product
from dcache.kernels.rms_norm import add_rms_norm, rms_norm
from dcache.kernels.rotary import rotary, rotary_table


@dataclass(frozen=True)
class ModelSpec:
    """Everything the engine and a policy may know of a model.

    Attributes:
        family: name of the adapter, for messages only.
        n_layers: transformer blocks.
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key/value heads; query head h reads head ``h // (n_heads / n_kv_heads)``.
        head_dim: width of a head.
        mlp_size: width of the gated MLP.
        vocab_size: rows of the embedding and of the head.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        max_positions: longest canvas the model was built for.
        mask_id: token that stands in a masked row.
        eos_id: end-of-text token.
        end_ids: every token that ends a text (end-of-text, end-of-turn).
        rope_full_precision: rotate in float32 and cast back, else in the compute dtype.
        qkv_bias: biases on q, k and v.
        tied_head: the head is the embedding.
        shift: a position is predicted by the row `shift` before it (0, or 1 for Dream).
        forbidden: tokens beside the mask that the published decoding of the family never predicts.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    mask_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    rope_full_precision: bool = True
    qkv_bias: bool = False
    tied_head: bool = False
    shift: int = 0
    forbidden: tuple[int, ...] = ()

    @property
    def q_width(self) -> int:
        """Width of all query heads side by side."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads side by side."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        block = (self.q_width + 2 * self.kv_width) * (self.d_model + self.qkv_bias) + self.q_width * self.d_model
        block += 3 * self.mlp_size * self.d_model + 2 * self.d_model
        ends = self.vocab_size * self.d_model * (1 if self.tied_head else 2) + self.d_model
        return self.n_layers * block + ends


class Block(nn.Module):
    """One layer. Projections that read the same input share one matrix: q, k, v in `qkv`, gate and up in `gate_up`."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.spec = spec

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        d, q, kv = spec.d_model, spec.q_width, spec.kv_width
        self.norm1 = weight(d)
        self.qkv = weight(q + 2 * kv, d)
        self.qkv_bias = weight(q + 2 * kv) if spec.qkv_bias else None
        self.out = weight(d, q)
        self.norm2 = weight(d)
        self.gate_up = weight(2 * spec.mlp_size, d)
        self.down = weight(d, spec.mlp_size)

    def slices(self, parts: str) -> slice:
        """Rows of `qkv` that belong to "q", "k", "v", or neighbours of these: "qk", "kv", "qkv"."""
        if not parts or parts not in "qkv":
            raise ValueError(f'parts is {parts!r}, expected neighbours among "qkv"')
        q, kv = self.spec.q_width, self.spec.kv_width
        begin, end = {"q": 0, "k": q, "v": q + kv}, {"q": q, "k": q + kv, "v": q + 2 * kv}
        return slice(begin[parts[0]], end[parts[-1]])

    def heads(self, x: Tensor) -> Tensor:
        """(batch, rows, heads * head_dim) -> (batch, heads, rows, head_dim)."""
        return x.reshape(*x.shape[:-1], -1, self.spec.head_dim).transpose(1, 2)

    def normed(self, h: Tensor) -> Tensor:
        """Input of the attention projections: (batch, rows, d_model)."""
        return rms_norm(h, self.norm1, self.spec.norm_eps)

    def project(self, y: Tensor, cos: Tensor, sin: Tensor, parts: str = "qkv") -> tuple[Tensor, ...]:
        """Queries and keys after rotary embedding, and values, of normed rows; one matrix product.

        Args:
            y: (batch, rows, d_model), from `normed`.
            cos: (batch or 1, 1, rows, head_dim / 2) float32 at the positions of the rows.
            sin: like `cos`.
            parts: which of them: "qkv", or neighbours among these, such as "kv".

        Returns:
            in the order of `parts`: q (batch, heads, rows, head_dim), k and v (batch, kv_heads, rows, head_dim).
        """
        rows, full = self.slices(parts), self.spec.rope_full_precision
        found = linear(y, self.qkv[rows], None if self.qkv_bias is None else self.qkv_bias[rows])
        widths = [self.spec.q_width if part == "q" else self.spec.kv_width for part in parts]
        heads = (self.heads(x) for x in torch.split(found, widths, dim=-1))
        return tuple(x if part == "v" else rotary(x, cos, sin, full) for part, x in zip(parts, heads, strict=True))

    def output(self, o: Tensor) -> Tensor:
        """Output projection: heads side by side (batch, rows, heads * head_dim) -> (batch, rows, d_model)."""
        return product(o, self.out)

    def ffn(self, h: Tensor) -> Tensor:
        """Increment of the MLP for rows of the residual stream: (batch, rows, d_model)."""
        y = rms_norm(h, self.norm2, self.spec.norm_eps)
        return product(gated_product(y, self.gate_up), self.down)

    def finish(self, h: Tensor, o: Tensor) -> Tensor:
        """Both residual additions of a layer, inference only: ``h + output(o)``, then ``+ ffn`` of that.

        The first addition shares a kernel with the norm behind it, the second one with the last product.

        Args:
            h: (batch, rows, d_model), input of the layer; left alone.
            o: (batch, rows, heads * head_dim), result of the attention.
        """
        h, y = add_rms_norm(h, self.output(o), self.norm2, self.spec.norm_eps)
        add_product(h, gated_product(y, self.gate_up), self.down)
        return h


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head.

    Args:
        spec: sizes.
        device: where the parameters are created, uninitialised. "meta" allocates nothing.
        dtype: of the parameters and of the computation.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: ModelSpec, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        device = torch.device(device)
        self.spec = spec
        self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.d_model, device=device, dtype=dtype))
        self.layers = nn.ModuleList(Block(spec, device, dtype) for _ in range(spec.n_layers))
        self.norm = nn.Parameter(torch.empty(spec.d_model, device=device, dtype=dtype))
        self.head = (
            None
            if spec.tied_head
            else nn.Parameter(torch.empty(spec.vocab_size, spec.d_model, device=device, dtype=dtype))
        )
        # one more than there are positions: padded rows stand at the slot behind the canvas
        n_positions = spec.max_positions + 1
        if device.type == "meta":  # for the shape alone, torch would import its compiler: a second of every start
            cos, sin = torch.empty(2, n_positions, spec.head_dim // 2, device=device, dtype=torch.float32)
        else:
            cos, sin = rotary_table(n_positions, spec.head_dim, spec.rope_theta, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of the residual stream."""
        return self.embedding.dtype

    def blocks(self) -> Iterator[Block]:
        """The layers, typed."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            yield layer

    @torch.no_grad()
    def init_random(self, seed: int = 0, std: float = 0.02) -> "Transformer":
        """Fill the parameters in place, on their device: normal weights, those that end a branch scaled by depth."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf.startswith("norm"):
                parameter.fill_(1)
            elif leaf == "qkv_bias":
                parameter.zero_()
            else:
                scale = std / (2 * self.spec.n_layers) ** 0.5 if leaf in ("out", "down") else std
                parameter.normal_(0, scale, generator=generator)
        return self

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, rows) int64 -> (batch, rows, d_model)."""
        return self.embedding[tokens]

    def positions(self, slots: Tensor) -> Tensor:
        """By which position each slot (batch, rows) is rotated: its own number."""
        return slots

    def angles(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at slots (batch, rows): each (batch, 1, rows, head_dim / 2) float32."""
        at = self.positions(slots)
        return self.cos[at][:, None], self.sin[at][:, None]

    def logits(self, h: Tensor) -> Tensor:
        """Final norm and head: (batch, rows, d_model) -> (batch, rows, vocab)."""
        return product(rms_norm(h, self.norm, self.spec.norm_eps), self.embedding if self.head is None else self.head)

    def keys(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows that see each other and nothing else, at positions from 0; inference only.

        The last layer projects them and stops there, so it runs no query.

        Args:
            h: (batch, rows, d_model), what the rows start from.

        Returns:
            keys after rotary embedding and values, each (layers, batch, kv_heads, rows, head_dim).
        """
        cos, sin = self.angles(torch.arange(h.shape[1], device=h.device)[None])
        *others, last = self.blocks()
        found: list[tuple[Tensor, ...]] = []
        for block in others:
            q, k, v = block.project(block.normed(h), cos, sin)
            found.append((k, v))
            h = block.finish(h, attend(q, k, v).transpose(1, 2).flatten(2))
        found.append(last.project(last.normed(h), cos, sin, "kv"))
        k, v = (torch.stack(parts) for parts in zip(*found, strict=True))
        return k, v

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        valid: Tensor | None = None,
        keep: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """All rows through all layers, bidirectional attention, no cache.

        Args:
            tokens: (batch, seq) int64; or give `embeddings`.
            embeddings: (batch, seq, d_model).
            valid: (batch, seq) bool; False hides a position as a key. Positions count from 0 over the padded row.
            keep: if given, filled with ``embeds``, ``q.i``, ``k.i``, ``v.i``, ``hidden.i`` and ``final_norm``.

        Returns:
            logits (batch, seq, vocab), not shifted: row i as it comes out of the head.
        """
        h = self.hidden(tokens, embeddings=embeddings, valid=valid, keep=keep)
        if keep is not None:
            keep["final_norm"] = rms_norm(h, self.norm, self.spec.norm_eps)
        return self.logits(h)

    def hidden(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        valid: Tensor | None = None,
        keep: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, without norm and head: (batch, seq, d_model), of which `logits` takes the rows one needs."""
        h = self.embed(tokens) if embeddings is None and tokens is not None else embeddings
        if h is None:
            raise ValueError("give tokens or embeddings")
        if keep is not None:
            keep["embeds"] = h
        cos, sin = self.angles(torch.arange(h.shape[1], device=h.device)[None])
        visible = None if valid is None or bool(valid.all()) else valid[:, None]
        for i, block in enumerate(self.blocks()):
            q, k, v = block.project(block.normed(h), cos, sin)
            o = attend(q, k, v, visible).transpose(1, 2).flatten(2)
            h = h + block.output(o)
            h = h + block.ffn(h)
            if keep is not None:
                keep.update({f"q.{i}": q, f"k.{i}": k, f"v.{i}": v, f"hidden.{i}": h})
        return h
