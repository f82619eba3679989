"""`LLM`: tokenizer, model, cache and compiled loops behind a few calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen_jax import prefix_io
from qwen_jax.answer import Answer, Generation
from qwen_jax.balance import balanced
from qwen_jax.build import load
from qwen_jax.cache import KVCache, init_cache, is_8_bit
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.context import Context, Document, capacity_for
from qwen_jax.decode import BLOCK, NO_TOKEN, Request, decode_block, first_token
from qwen_jax.hub import resolve
from qwen_jax.loading import open_checkpoint
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Prefiller, default_chunk
from qwen_jax.processes import replicated
from qwen_jax.progress import progress_bar
from qwen_jax.request import Prompt, RequestError, ids_of, pad, split_prompts
from qwen_jax.sampling import (
    GenerationDefaults,
    ResolvedSampling,
    SamplingParams,
)
from qwen_jax.sharding import CONTEXT, full_mesh
from qwen_jax.sparsity.switch import check_name, sparse_prefill
from qwen_jax.spread import Spread
from qwen_jax.tokenizer import Tokenizer, has_tokenizer

_FP8 = jnp.float8_e4m3fn
_KV_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, _FP8)))
STREAM_BLOCK = 8  # tokens between two pieces of streamed text
DEFAULT_NEW_TOKENS = 512
_NOTHING = np.zeros(0, np.int32)


class LLM:
    """A model that answers.

    Attributes:
        model, config, tokenizer (None if the checkpoint has none), defaults (its generation_config.json).
        max_len: most tokens of prompt and answer together.
    """

    def __init__(
        self,
        path_or_model: str | Path | Qwen2,
        *,
        max_len: int | None = None,
        prefill_chunk: int | None = None,
        dtype: DTypeLike | None = None,
        kv_dtype: DTypeLike | None = None,
        weight_dtype: str | None = None,
        matmul: str | None = None,
        sparsity: str | None = None,
        mesh: Mesh | None = None,
        dca: DualChunk | Literal[False] | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 8,
        progress: bool = False,
    ):
        """Loads what `path_or_model` names.

        Args:
            path_or_model: a Hugging Face folder, a converted folder, a hub id, or a loaded `Qwen2`.
            max_len: default: the config's max_position_embeddings.
            prefill_chunk: tokens of a prefill piece; default `prefill.default_chunk`.
            dtype: of weights and activations; default: the checkpoint's. It, `weight_dtype`, `matmul` and `dca` are for a path.
            kv_dtype: of the cache: bfloat16, float16, float32, or 8 bits: "int8", or the less exact "fp8" (e4m3); default:
                that of the weights. Keys beside bfloat16 are float16, but on TPUs (`cache.keys_dtype`). For 8 bits `self.model`
                gets new weights for queries and keys, see `balance`.
            weight_dtype, matmul: 8-bit weights and products, see `load`.
            sparsity: "vertical-slash": prompts above the config's sparse_attention_threshold (32,768 tokens unless it says
                otherwise) are prefilled over the lines that the folder's sparse_attention_config.json allows each head;
                "bands": over the columns and bands of most attention for as many computed pairs, "bands:0.5" for half as
                many; "none": dense; None: the first if that file is there and config.json does not switch it off.
            mesh: where weights and cache go; default: one device, or where a loaded model is.
            dca: dual chunk attention to use instead of the config's; False: none.
            tokenizer: default: the one in the checkpoint's folder, if any.
            batch_size: most prompts that run together.
            progress: show bars with the remaining time when stderr is a terminal.

        Several processes (`processes.join`) make the same LLM with one mesh over all their devices, and then the same calls.

        Raises:
            QwenJaxError: whatever `load` refuses; a setting outside its range; max_len beyond the model's positions.
        """
        check_name(sparsity)
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(path_or_model, Qwen2):
            _check_loaded(
                path_or_model, mesh=mesh, dtype=dtype, weight_dtype=weight_dtype, matmul=matmul, dca=dca
            )
            self.model, self.tokenizer, self.defaults = path_or_model, tokenizer, GenerationDefaults()
            sparse = sparse_prefill(sparsity, None, self.model.config)
        else:
            folder = resolve(path_or_model)
            sparse = sparse_prefill(sparsity, folder, open_checkpoint(folder).config)
            with progress_bar("loading", show=progress, unit="bytes") as bar:
                self.model = load(
                    folder,
                    dtype=dtype,
                    mesh=mesh,
                    dca=dca,
                    weight_dtype=weight_dtype,
                    matmul=matmul,
                    progress=bar,
                )
            self.defaults = GenerationDefaults.from_folder(folder)
            self.tokenizer = tokenizer
            if tokenizer is None and has_tokenizer(folder):
                self.tokenizer = Tokenizer.from_folder(folder)
        self.config = self.model.config
        if not self.defaults.eos_token_ids:
            self.defaults = dataclasses.replace(self.defaults, eos_token_ids=self.config.eos_token_ids)
        positions = self.config.max_position_embeddings
        self.max_len = positions if max_len is None else max_len
        if self.max_len < 1:
            raise RequestError(f"max_len must be at least 1, got {max_len}")
        if self.config.dual_chunk is None and self.max_len > positions:
            raise RequestError(
                f"max_len={self.max_len} is beyond the {positions} positions of this model: lower it, or put dual "
                f"chunk attention on the model (dca=DualChunk(chunk_size, local_size))"
            )
        if prefill_chunk is not None and prefill_chunk < 1:
            raise RequestError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        # The cache goes where the weights are: on another mesh the first piece would compile a program of its own.
        placed = getattr(self.model.embed.weight[...].sharding, "mesh", mesh)
        self._mesh = full_mesh(placed) if isinstance(placed, Mesh) else mesh
        self._spread = self.model.spread
        self._batch_size, self._progress = batch_size, progress
        self._kv_dtype = _kv_dtype(kv_dtype, self.model.embed.weight[...].dtype)
        if is_8_bit(self._kv_dtype):
            self.model = balanced(self.model)
        self._graph, self._params = nnx.split(self.model)
        chunk = _chunk(prefill_chunk, self.config, self._spread)
        self._prefiller = Prefiller(self._graph, self._params, self.config, chunk, sparse)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prefix: Document | None = None,
        anew: bool = False,
    ) -> Any:
        """Answers one prompt (text or a list of ids: gives one Generation) or several (gives a list, in order).

        Args:
            prompts: text or token ids; with `prefix` they stand right after the document.
            params: one for all or one a prompt; what it leaves open comes from generation_config.json.
            prefix: a document of `prefill` or `load_prefix`; it stays usable. Its questions are answered one by one.
            anew: with a prefix: prefill document and prompt together instead of reading the document's cache.

        Raises:
            QwenJaxError: empty prompt, token id outside the vocabulary, prompt and answer beyond max_len.
        """
        single, given = split_prompts(prompts)
        rows = [self.token_ids(prompt) for prompt in given]
        settings = self._settings(params, len(rows))
        out: list[Generation] = []
        if prefix is not None:
            self._check_made_here(prefix)
        if prefix is not None and not anew:
            for ids, setting in zip(rows, settings, strict=True):
                answers = [self._answer(setting, len(prefix) + len(ids))]
                for _ in self._run(prefix, [ids], answers, [setting], BLOCK):
                    pass
                out.append(answers[0].result())
        else:
            if prefix is not None:
                rows = [np.concatenate([prefix.token_ids, ids]) for ids in rows]
            for n in range(0, len(rows), self._batch_size):
                batch, chosen = rows[n : n + self._batch_size], settings[n : n + self._batch_size]
                answers = [self._answer(s, len(ids)) for ids, s in zip(batch, chosen, strict=True)]
                for _ in self._run(self._new_context(batch, answers), batch, answers, chosen, BLOCK):
                    pass
                out += [answer.result() for answer in answers]
        return out[0] if single else out

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prefix: Document | None = None,
        anew: bool = False,
    ) -> Generator[str, None, Generation]:
        """Yields the answer as it grows, in pieces of whole characters, and returns it whole.

        Arguments and errors as in `generate`. A document gives one answer at a time: asking it again ends the stream
        before, which raises QwenJaxError if read on.
        """
        ids, context = self.token_ids(prompt), prefix
        if prefix is not None:
            self._check_made_here(prefix)
            if anew:
                ids, context = np.concatenate([prefix.token_ids, ids]), None
        return (yield from self.run_context(self.new_context() if context is None else context, ids, params))

    def run_context(
        self, context: Context, ids: np.ndarray, params: SamplingParams | None = None
    ) -> Generator[str, None, Generation]:
        """Streams the answer to `ids` standing behind what `context` holds, and returns it whole; `Chat` is made of this.

        The context's cache ends up with the keys of `ids` and of all answered tokens but the last; its token_ids are the
        caller's to set.
        """
        (setting,) = self._settings(params, 1)
        answers = [self._answer(setting, len(context) + len(ids))]
        for (piece,) in self._run(context, [ids], answers, [setting], STREAM_BLOCK):
            if piece:
                yield piece
        return answers[0].result()

    def new_context(self) -> Context:
        """An empty context of one row, which grows as it is used."""
        return Context(self._empty_cache(1, 1), spread=self._spread)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that the checkpoint's chat template makes of messages, up to where the answer begins.

        Raises:
            QwenJaxError: no tokenizer, no chat template, or a template that refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError("the checkpoint has no tokenizer, so it cannot chat")
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def prefill(self, text: Prompt, *, room: int = 2 * DEFAULT_NEW_TOKENS) -> Document:
        """Runs a document through the model once; the result serves as `prefix=` any number of times.

        Args:
            text: the document, text or token ids.
            room: positions kept free behind it for a question and its answer; a longer one makes the cache grow, which
                needs old and new cache at once.

        Raises:
            QwenJaxError: empty text, token id outside the vocabulary, longer than max_len.
        """
        ids = self.token_ids(text)
        self._check_length(len(ids), 0)
        document = Document(self._empty_cache(1, len(ids) + room), _NOTHING, self._owner, self._spread)
        self._extend(document, [ids])
        document.token_ids = ids
        return document

    def load_prefix(self, path: str | Path) -> Document:
        """Reads a document that `Document.save` wrote.

        Raises:
            QwenJaxError: no such document, longer than max_len, or made by a model of another shape or position scheme
                or by a version of qwen-jax that held keys otherwise.
        """

        def allocate(tokens: int) -> KVCache:
            self._check_length(tokens, 0)
            return self._empty_cache(1, tokens)

        return prefix_io.load(Path(path), self.model, self._kv_dtype, allocate)

    def score(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-probability of each next token, float32[T - 1], through the same chunked prefill.

        Raises:
            QwenJaxError: fewer than two tokens, an id outside the vocabulary, longer than max_len.
        """
        ids = self.token_ids(token_ids)
        if len(ids) < 2:
            raise RequestError("score needs at least two tokens: nothing stands before the first")
        self._check_length(len(ids), 0)
        with progress_bar("scoring", len(ids) - 1, show=self._progress) as bar:
            return self._prefiller.score(ids, self._empty_cache(1, len(ids)), on_piece=bar)

    def _run(
        self,
        context: Context,
        rows: list[np.ndarray],
        answers: list[Answer],
        settings: list[ResolvedSampling],
        block: int,
    ) -> Iterator[list[str]]:
        """Prefills `rows` behind what the context holds, decodes, feeds `answers`; yields each row's new text after a block."""
        turn = context.begin()
        context.reserve(
            len(context) + max(len(r) + a.limit for r, a in zip(rows, answers, strict=True)),
            self.max_len,
        )
        last_BD = self._extend(context, rows)
        idle = context.cache.batch - len(rows)  # rows without an answer, which fill the axis `data`
        rows, settings = [*rows, *[_NOTHING] * idle], [*settings, *settings[:1] * idle]
        lengths_B = np.array([len(context) + len(ids) for ids in rows], np.int32)
        whole = [np.concatenate([context.token_ids, ids]) for ids in rows]
        whole_BT = pad(whole, width=context.cache.capacity)  # one program serves every length
        limit_B = np.array([answer.limit for answer in answers] + [1] * idle)
        request = Request.of(lengths_B, limit_B, settings, self._prefiller.where)
        state = first_token(self._graph, self._params, last_BD, whole_BT, request)
        tokens_BT = np.asarray(state.token_B)[:, None]
        while True:
            yield [a.push(t[t != NO_TOKEN]) for a, t in zip(answers, tokens_BT, strict=False)]
            # A stop string ends rows the device thinks alive.
            done_B = np.array([answer.done for answer in answers] + [True] * idle)
            if done_B.all():
                return
            context.require(turn)
            state = state._replace(done_B=replicated(done_B, self._prefiller.where))
            out_BT, context.cache, state = decode_block(
                self._graph, self._params, request, context.cache, state, np.int32(block)
            )
            tokens_BT = np.asarray(out_BT)

    def _extend(self, context: Context, rows: list[np.ndarray]) -> jax.Array:
        """Runs right-padded rows behind what the context holds; returns each row's last hidden state [B, D]."""
        rows = [*rows, *[_NOTHING] * (context.cache.batch - len(rows))]
        tokens_BT, start = pad(rows), len(context)
        lengths_B = np.array([start + len(ids) for ids in rows], np.int32)
        queued: jax.Array | None = None
        before = 0
        with progress_bar("prefill", tokens_BT.shape[1], show=self._progress) as bar:
            for done, last_BD, cache in self._prefiller.run(tokens_BT, lengths_B, context.cache, start):
                context.cache = cache
                if self._progress and queued is not None:
                    queued.block_until_ready()  # the piece before this one: the device is never left idle
                    bar(before)
                queued, before = last_BD, done
        return last_BD

    def _new_context(self, rows: list[np.ndarray], answers: list[Answer]) -> Context:
        longest = max(len(ids) + answer.limit for ids, answer in zip(rows, answers, strict=True))
        return Context(self._empty_cache(len(rows), longest), spread=self._spread)

    def _empty_cache(self, rows: int, tokens: int) -> KVCache:
        multiple = self._spread.round if self._spread else 1
        capacity = capacity_for(tokens, self.max_len, multiple, self._prefiller.chunk)
        return init_cache(self.config, self._padded(rows), capacity, self._kv_dtype, self._mesh)

    def _padded(self, rows: int) -> int:
        """The rows that run where `rows` are asked for: empty ones are added, so that the axis `data` divides them."""
        multiple = self._spread.rows if self._spread else 1
        return -(-rows // multiple) * multiple

    def _answer(self, setting: ResolvedSampling, prompt: int) -> Answer:
        """An empty answer of at most max_new_tokens; if nobody asked for a number, the checkpoint's, or 512, or what fits."""
        limit = setting.max_new_tokens
        if limit is None:
            limit = max(1, min(self.defaults.max_new_tokens or DEFAULT_NEW_TOKENS, self.max_len - prompt))
        self._check_length(prompt, limit)
        if setting.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the checkpoint has none")
        return Answer(setting, limit, prompt, self.tokenizer)

    def _settings(
        self, params: SamplingParams | Sequence[SamplingParams] | None, rows: int
    ) -> list[ResolvedSampling]:
        given = [params] * rows if params is None or isinstance(params, SamplingParams) else list(params)
        if len(given) != rows:
            raise RequestError(f"{len(given)} sampling settings for {rows} prompts")
        # The checkpoint's max_new_tokens is no wish of the caller's: it gives way to max_len, in `_answer`.
        defaults = dataclasses.replace(self.defaults, max_new_tokens=None)
        return [(p or SamplingParams()).resolve(defaults) for p in given]

    def token_ids(self, prompt: Prompt) -> np.ndarray:
        """int32[T] of a prompt. Raises QwenJaxError: empty, not text or a flat list of ids, an id outside the vocabulary."""
        return ids_of(prompt, self.tokenizer, self.config.vocab_size)

    @functools.cached_property
    def _owner(self) -> dict[str, object]:
        return prefix_io.owner(self.model)

    def _check_made_here(self, prefix: Document) -> None:
        if prefix.owner != self._owner:
            raise RequestError(
                "the prefix was made with another model, or with other positions: prefill the text with this one"
            )
        if prefix.cache.dtype != self._kv_dtype:
            raise RequestError(
                f"the prefix has a cache of {prefix.cache.dtype}, this LLM makes {self._kv_dtype}: prefill the text with it"
            )

    def _check_length(self, prompt: int, new: int) -> None:
        if prompt + new > self.max_len:
            wish = f"{prompt} tokens" + (f" and {new} new ones" if new else "")
            raise RequestError(
                f"{wish} do not fit max_len={self.max_len}: raise max_len or shorten the prompt"
            )


def _chunk(wanted: int | None, config: ModelConfig, spread: Spread | None) -> int:
    """Tokens of a prefill piece: whole rounds over the context axis."""
    whole = spread.round if spread else 1
    if wanted is None:
        return default_chunk(config, whole)
    if wanted < whole:
        assert spread is not None
        raise RequestError(
            f"prefill_chunk={wanted} is below the {whole} positions that context={spread.mesh.shape[CONTEXT]} deals out in "
            f"one round: raise it to a multiple of {whole}"
        )
    return wanted // whole * whole


def _check_loaded(model: Qwen2, *, mesh: Mesh | None, **settings: object) -> None:
    """Refuses settings that would come too late for a loaded model."""
    for name, value in settings.items():
        if value is not None:
            raise RequestError(
                f"{name}= comes too late for a loaded model: give it to `load`, or give LLM the path"
            )
    devices = model.embed.weight[...].devices()
    if mesh is not None and set(mesh.devices.flat) != devices:
        raise RequestError("mesh= names other devices than those the loaded model is on: give it to `load`")


def _kv_dtype(wanted: DTypeLike | None, weights: np.dtype) -> np.dtype:
    try:
        dtype = jnp.dtype(weights if wanted is None else _FP8 if wanted == "fp8" else wanted)
    except TypeError:
        dtype = None
    if dtype not in _KV_DTYPES:
        raise RequestError(f"kv_dtype={wanted!r} is not one of bfloat16, float16, float32, int8, fp8")
    return dtype
