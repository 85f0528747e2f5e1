"""Greedy generation of a GPT-2 of 11.5M parameters on the CPU: metajax beside Hugging Face transformers, with random weights.

    python -m benchmarks.cpu_generation [--batch 1] [--rounds 7]

Both read 32 tokens and draw 90. PyTorch: pip install torch==2.13.0 transformers. Numbers are ratios of workers that take turns;
above 1 is slower than metajax.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks.turns import ratios, take_turns, work

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, PROMPT, COUNT = 6, 384, 6, 2048, 128, 32, 90


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY - 16, (batch, PROMPT)).astype(np.int32)


def metajax_generation(batch: int) -> Callable[[], int]:
    import jax
    import jax.numpy as jnp

    from metajax import registry
    from metajax.core.fields import override
    from metajax.data.tokenizers import Vocabulary
    from metajax.inference.decoding import Sampling, advance
    from metajax.inference.forward import prepare
    from metajax.inference.generation import Rows, make_rules
    from metajax.models.presets import gpt2
    from metajax.training.program import build_model

    registry.load("experiments")
    changes = {"model": gpt2(LAYERS, HEADS, WIDTH), "data.sequence_length": LENGTH, "meta_tokens": None}
    config = override(registry.find_experiment("quickstart/plain").build("cpu"), changes)
    vocabulary = Vocabulary.above(VOCABULARY - 16)
    ready = prepare(build_model(config, vocabulary.size, jax.random.key(0)))
    rules = make_rules(config, vocabulary, Sampling(temperature=0.0), seed=0).replace(ends=jnp.array([-1]))

    def run() -> int:
        state = Rows.of(config, prompts(batch).tolist(), vocabulary, COUNT).start(ready, rules)
        return int(jax.block_until_ready(advance(ready, state, rules, config.row_positions)).left.sum())

    return run


def transformers_generation(batch: int) -> Callable[[], int]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(2)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)).eval()
    ids = torch.from_numpy(prompts(batch).astype(np.int64))
    options = {"do_sample": False, "max_new_tokens": COUNT, "min_new_tokens": COUNT, "pad_token_id": 0}

    def run() -> int:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape[1]

    return run


WORKERS = {"metajax": metajax_generation, "transformers": transformers_generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(WORKERS[options.worker](options.batch), 1)
        return
    command = ("-m", "benchmarks.cpu_generation", "--batch", str(options.batch), "--worker")
    print("\n".join(ratios(take_turns({name: (*command, name) for name in WORKERS}, options.rounds), "metajax")))


if __name__ == "__main__":
    main()
