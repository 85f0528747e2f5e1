"""GPT-2 small with rotary positions and meta-attention, as in metajax/models/lm.py, built from PyTorch's fastest parts.

One product for queries, keys and values, FlashAttention through SDPA, FlexAttention for the dense meta mask, torch.compile over the whole
model with its loss, autocast to bfloat16 over float32 weights, fused AdamW.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from benchmarks.gpu.rivals import DEVICE, compile_here, meta_mask, wait
from metajax.config import Config


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, block_mask: Any = None) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if block_mask is None:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = flex.flex_attention(q, k, v, block_mask=block_mask)
        return self.output(out.transpose(1, 2).reshape(rows, length, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, has_meta: bool):
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width, bias=False)
        self.meta, self.meta_norm = (Attention(width, heads), nn.LayerNorm(width, bias=False)) if has_meta else (None, None)
        self.up, self.down = nn.Linear(width, mlp_width, bias=False), nn.Linear(mlp_width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor, table: tuple, meta: dict[str, Any]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *table)
        if self.meta is not None:
            x = self.add_dense(x, table, **meta) if "block_mask" in meta else self.add_gathered(x, **meta)
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))

    def add_gathered(self, x: Tensor, meta_positions: Tensor, table: tuple) -> Tensor:
        where = meta_positions[..., None].expand(-1, -1, x.shape[-1])
        change = self.meta(self.meta_norm(x.gather(1, where)), *table)
        return x.scatter_add(1, where, change.to(x.dtype))

    def add_dense(self, x: Tensor, table: tuple, block_mask: Any, flags: Tensor) -> Tensor:
        change = self.meta(self.meta_norm(x), *table, block_mask)
        return x + torch.where(flags[..., None], change, 0)


class Model(nn.Module):
    """Mean cross-entropy of a batch. `meta_positions` int64[B, M]: positions of the meta-tokens, None for a model without them."""

    def __init__(self, config: Config, vocab_size: int, meta_positions: np.ndarray | None):
        super().__init__()
        model, length = config.model, config.row_positions
        self.embedding = nn.Embedding(vocab_size, model.width)
        has_meta = meta_positions is not None
        self.blocks = nn.ModuleList(Block(model.width, model.heads, model.mlp_width, has_meta) for _ in range(model.layers))
        self.final_norm = nn.LayerNorm(model.width, bias=False)
        half = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
        angles = (torch.arange(length)[:, None] * model.rope_theta**-half).float().to(DEVICE)
        self.table, self.meta = (angles.cos(), angles.sin()), {}
        if has_meta:
            at = torch.from_numpy(meta_positions).to(DEVICE)
            flags = torch.zeros(len(meta_positions), length, dtype=torch.bool, device=DEVICE).scatter_(1, at, True)
            gathered = {"positions": at, "table": tuple(x[at][:, None] for x in self.table)}
            dense = (
                {"flags": flags, "block_mask": meta_mask(meta_positions, length)}
                if config.meta_tokens.attention == "dense"
                else {}
            )
            self.meta = dense or gathered

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.table, self.meta)
        logits = functional.linear(self.final_norm(x), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Load metajax's parameters by dotted path: blocks stacked over the layers, matrices as inputs x outputs."""
        state = {"embedding.weight": params["embedding"], "final_norm.weight": params["final_norm.scale"]}
        for i in range(len(self.blocks)):
            for name in ("attention", *(("meta",) if self.blocks[i].meta is not None else ())):
                ours, output = (
                    ("blocks.0.0.meta_attention",) * 2 if name == "meta" else ("blocks.0.0.mixer.attention", "blocks.0.0.mixer")
                )
                parts = [params[f"{ours}.{part}.w"][i] for part in ("query", "key", "value")]
                state[f"blocks.{i}.{name}.qkv.weight"] = np.concatenate(parts, axis=1).T
                state[f"blocks.{i}.{name}.output.weight"] = params[f"{output}.output.w"][i].T
                state[f"blocks.{i}.{name}_norm.weight"] = params[
                    f"blocks.0.0.{'mixer' if name == 'attention' else name}_norm.scale"
                ][i]
            state |= {f"blocks.{i}.{name}.weight": params[f"blocks.0.0.mlp.{name}.w"][i].T for name in ("up", "down")}
            state[f"blocks.{i}.mlp_norm.weight"] = params["blocks.0.0.mlp_norm.scale"][i]
        self.load_state_dict({name: torch.tensor(x) for name, x in state.items()})


class Trainer:
    """The model with its optimiser; `step` follows the recipe: clipping, AdamW with decay of matrices only, linear warm-up."""

    wait = staticmethod(wait)

    def __init__(self, config: Config, vocab_size: int, batch: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]):
        optimizer = config.optimizer
        torch.set_float32_matmul_precision("high")
        torch._dynamo.reset()
        meta_positions = batch["meta_positions"].astype(np.int64) if "meta_positions" in batch else None
        self.model = Model(config, vocab_size, meta_positions).to(DEVICE)
        self.model.load(params)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas, fused=True)
        self.loss = compile_here(self.model)
        self.inputs = [torch.from_numpy(batch[name].astype(np.int64)).to(DEVICE) for name in ("tokens", "targets")]
        self.low, self.recipe, self.taken = config.model.compute_dtype == "bfloat16", optimizer, 0

    def step(self) -> Tensor:
        rate = self.recipe.learning_rate * min((self.taken + 1) / (self.recipe.warmup_steps + 1), 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.low):
            loss = self.loss(*self.inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.taken += 1
        return loss.detach()


def forget_peak() -> int | None:
    """Reset the peak and return the bytes that PyTorch's tensors take now; None on a CPU."""
    if DEVICE == "cpu":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory() -> int:
    """Peak bytes of PyTorch's tensors."""
    return torch.cuda.max_memory_allocated()
