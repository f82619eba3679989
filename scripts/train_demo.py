"""Trains the shipped checkpoint (qwen_jax/demo_checkpoint) from nothing: two and a half minutes on one H200.

    python scripts/train_demo.py --work runs/demo                 # rerun the same command to resume

Lengths grow from 256 to 2,048 tokens: trained at 2,048 from the start, the model never learns to copy. Dual chunk attention
equals plain RoPE up to 2,049 tokens, so training knows nothing of it: the exported config switches it on. Batches are made by
worker processes and depend on (seed, step) alone, so a resumed run sees the data it would have seen.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.errors import QwenJaxError
from qwen_jax.evals import demo_folder
from qwen_jax.evals.passkey import VOCAB_SIZE
from qwen_jax.evals.passkey_training import FIRST_DIGIT_WEIGHT, step_batch
from qwen_jax.linear import einsum
from qwen_jax.model import Qwen2
from qwen_jax.rope import Stage

Params = dict[str, jax.Array]  # by Param.path, float32


@dataclasses.dataclass(frozen=True)
class Phase:
    """`steps` batches of `rows` sequences of `length` tokens."""

    length: int
    rows: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> Phase:
        """From "LENGTH:ROWS:STEPS"."""
        try:
            return cls(*map(int, text.split(":")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r} is not LENGTH:ROWS:STEPS") from None


PHASES = (Phase(256, 256, 3500), Phase(512, 128, 1500), Phase(1024, 64, 1500), Phase(2048, 32, 3000))
LAYERS, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 4, 256, 704, 4, 2, 64
PEAK_RATE, FINAL_RATE, WARMUP = 2e-3, 2e-5, 300
WEIGHT_DECAY, BETA2, CLIP = 0.05, 0.98, 1.0


def model_config(layers: int, width: int, mlp: int) -> ModelConfig:
    """The model as it is trained: plain RoPE."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        max_position_embeddings=2048,
        tie_embeddings=True,
    )


class Learner:
    """The jitted training step of one model and one learning-rate schedule of `total` steps."""

    def __init__(self, config: ModelConfig, total: int, seed: int):
        self.graph, template = nnx.split(Qwen2(config, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
        flat = nnx.to_flat_state(template)
        self.paths = [".".join(map(str, path)) for path, _ in flat]
        self._structure = jax.tree.structure(template)
        self._initial = dict(zip(self.paths, jax.tree.leaves(template), strict=True))
        warmup = min(WARMUP, total // 10)
        rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, warmup, max(total, 1), FINAL_RATE)
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.adamw(rate, b2=BETA2, weight_decay=WEIGHT_DECAY, mask=_decayed),
        )

    def init(self) -> dict[str, Any]:
        """Everything a resumed run needs: parameters, optimizer state, steps done."""
        params = {path: jnp.array(value) for path, value in self._initial.items()}
        return {"params": params, "optimizer": self._optimizer.init(params), "step": jnp.int32(0)}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: dict[str, Any], ids_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """One update; the metrics are the weighted loss (nats a token) and the share of answers whose first digit is right."""
        grads, metrics = jax.grad(self._loss, has_aux=True)(state["params"], ids_BT, weights_BT)
        updates, optimizer = self._optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, metrics

    def _loss(
        self, params: Params, ids_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids_BT = ids_BT.astype(jnp.int32)
        logits_BTV = self._logits(
            {path: value.astype(jnp.bfloat16) for path, value in params.items()}, ids_BT
        )
        targets_BT = jnp.roll(ids_BT, -1, axis=1)
        weights_BT = jnp.roll(weights_BT, -1, axis=1).astype(jnp.float32).at[:, -1].set(0.0)
        loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        loss = (loss_BT * weights_BT).sum() / weights_BT.sum()
        asked_BT = weights_BT == FIRST_DIGIT_WEIGHT
        right_BT = logits_BTV.argmax(-1) == targets_BT
        return loss, {"loss": loss, "right": (asked_BT & right_BT).sum() / jnp.maximum(asked_BT.sum(), 1)}

    def _logits(self, params: Params, ids_BT: jax.Array) -> jax.Array:
        """What `Qwen2.__call__` computes, for whole rows, with the two operations that a GPU trains fast with."""
        leaves = [params[path] for path in self.paths]
        model = nnx.merge(self.graph, jax.tree.unflatten(self._structure, leaves))
        positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)

        def attend(q_BTNH: jax.Array, k: jax.Array, v: jax.Array, cache: None, layer: jax.Array) -> Any:
            q = model.rotary.rotate_queries(q_BTNH, positions_BT, Stage.INTRA)
            fused = "cudnn" if jax.default_backend() == "gpu" else None
            k = k.astype(q.dtype)
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused), cache

        # A product with one-hot rows: the backward pass of a gather would add 65,536 rows into 260 in bf16.
        one_hot_BTV = jax.nn.one_hot(ids_BT, model.config.vocab_size, dtype=jnp.bfloat16)
        x_BTD = einsum("BTV,VD->BTD", one_hot_BTV, params["embed.weight"])
        return model.logits(model.run_layers(x_BTD, positions_BT, None, attend)[0])


def _decayed(params: Params) -> dict[str, bool]:
    """Matrices decay; norms and biases do not."""
    return {path: path.endswith(".weight") and "norm" not in path for path in params}


def batches(
    seed: int, phases: tuple[Phase, ...], start: int, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of steps `start`, `start + 1`, ..., made ahead by `workers` processes (0: made here)."""
    plan = enumerate(phase for phase in phases for _ in range(phase.steps))
    steps = ((seed, step, phase.rows, phase.length) for step, phase in plan if step >= start)
    if not workers:
        for args in steps:
            yield step_batch(*args)
        return
    # spawn: a fork of a process that runs JAX can deadlock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        ahead: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for args in steps:
            ahead.append(pool.submit(step_batch, *args))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def train(
    learner: Learner,
    phases: tuple[Phase, ...],
    work: Path,
    *,
    seed: int,
    workers: int = 0,
    save_every: int = 2000,
    log_every: int = 100,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Trains from the newest checkpoint in `work`, or from nothing, to the end or until `minutes` are over.

    Returns the state: the last step's checkpoint is then in `work`, too.

    Raises:
        QwenJaxError: `work` holds a run of another recipe.
    """
    recipe = {
        "seed": seed,
        "phases": [dataclasses.astuple(phase) for phase in phases],
        "shapes": {path: list(value.shape) for path, value in learner._initial.items()},
    }
    began = time.monotonic()
    with ocp.CheckpointManager(
        work.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        state = _restore(manager, learner.init(), recipe)
        done, total = int(state["step"]), sum(phase.steps for phase in phases)

        def save() -> None:
            manager.save(
                done,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), recipe=ocp.args.JsonSave(recipe)),
            )

        stream = batches(seed, phases, done, workers)
        for ids, weights in stream:
            state, metrics = learner.step(state, ids, weights)
            done += 1
            if done % log_every == 0 or done == total:
                figures = "  ".join(f"{name} {float(value):.4f}" for name, value in metrics.items())
                elapsed = time.monotonic() - began
                print(
                    f"step {done:6d}/{total}  length {ids.shape[1]:5d}  {figures}  {elapsed:6.1f} s",
                    flush=True,
                )
                if minutes is not None and elapsed > 60 * minutes:
                    print(f"stopped after {minutes} minutes: run the same command to go on", flush=True)
                    break
            if done % save_every == 0 and done < total:
                save()
        stream.close()
        if manager.latest_step() != done:
            save()
        manager.wait_until_finished()
    return state


def _restore(manager: ocp.CheckpointManager, fresh: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    latest = manager.latest_step()
    if latest is None:
        return fresh
    stored = manager.restore(latest, args=ocp.args.Composite(recipe=ocp.args.JsonRestore())).recipe
    if stored != json.loads(json.dumps(recipe)):
        raise QwenJaxError(f"{manager.directory} holds a run of another recipe: give --work another folder")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
    print(f"resuming after step {latest}", flush=True)
    return manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the training checkpoints (orbax)")
    parser.add_argument("--out", type=Path, default=demo_folder.DEFAULT, help="Hugging Face folder to write")
    parser.add_argument("--phases", type=Phase.parse, nargs="+", default=PHASES, metavar="LENGTH:ROWS:STEPS")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--mlp", type=int, default=MLP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 1) - 2, 0))
    parser.add_argument("--save-every", type=int, default=2000, metavar="STEPS")
    parser.add_argument("--minutes", type=float, help="stop cleanly after so long; rerun to go on")
    args = parser.parse_args()
    phases = tuple(args.phases)
    config = model_config(args.layers, args.width, args.mlp)
    learner = Learner(config, sum(phase.steps for phase in phases), args.seed)
    state = train(
        learner, phases, args.work,
        seed=args.seed, workers=args.workers, save_every=args.save_every, minutes=args.minutes,
    )  # fmt: skip
    demo_folder.write(args.out, config, {path: np.asarray(value) for path, value in state["params"].items()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
