"""The Python interface of the library: `Gemma`, a model that generates, chats and scores."""

import functools
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.config import ComputeConfig, MeshConfig, SamplingConfig, mesh_text, replace
from gemma_jax.config.validation import sampling_config, sampling_configs, validate_stream
from gemma_jax.data.chat import Message, encode_prompt
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained.adapted import base_spec, with_adapters
from gemma_jax.pretrained.checkpoint import open_adapter, open_checkpoint
from gemma_jax.pretrained.end_tokens import END_OF_TURN, EOS
from gemma_jax.sampling import (
    Chat,
    FinishReason,
    Generation,
    Generator,
    Request,
    Scorer,
    TextCompletion,
    complete_requests,
)
from gemma_jax.sampling.chat import MAX_NEW_TOKENS
from gemma_jax.sampling.requests import Completion, check_ids, indices_of, padded, requests_of
from gemma_jax.sharding import make_mesh, platform, row_parts
from gemma_jax.startup import keep_programs
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.weights import Context, Quantization, parameter_table

PROGRAMS = "~/.cache/gemma_jax/programs"  # that were compiled for sampling


class Gemma:
    """A Gemma model on a mesh, with its tokenizer.

    Make one with `Gemma.from_pretrained`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: nnx.State,
        tokenizer: Tokenizer | None,
        end_tokens: Sequence[int] = (EOS,),
        terms_source: str = "",
        adapters: Sequence[str] = (),
    ) -> None:
        """Args:
        spec: The spec of the model.
        params: The model's parameters, on the mesh.
        tokenizer: The model's tokenizer. With None, only the calls that take token ids work.
        end_tokens: The ids that end a continuation.
        terms_source: Where the weights come from, if they are under the Gemma terms of use.
        adapters: The names of the model's adapters, in order. An empty name is that of the adapter that is
          used where none is named.

        Raises:
          UserError: the tokenizer has a larger vocabulary than the model. A smaller one is accepted: it is
            common where fine-tuning has added rows to the embedding, whose ids have no text here.
        """
        config = spec.config
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, but the model a vocabulary of "
                f"{config.vocab_size}; they belong to different models."
            )
        self.spec, self.params = spec, params
        self.config, self.mesh, self.compute = config, spec.mesh, spec.compute
        self.end_tokens = tuple(end_tokens)
        self._tokenizer, self._terms_source, self._adapters = tokenizer, terms_source, list(adapters)
        self._generator, self._scorer = Generator(spec, params), Scorer(spec, params)

        def logits(params: nnx.State, tokens: jax.Array, chosen: jax.Array) -> jax.Array:
            model, context = spec.merge(params), Context(adapters=chosen)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden = model(tokens, positions, jnp.ones_like(tokens), context)
            return model.logits(hidden, context)[..., : config.vocab_size]

        self._logits = jax.jit(logits)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        mesh: MeshConfig | None = None,
        compute: ComputeConfig | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        instruction_tuned: bool | None = None,
        quantization: str = "",
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> "Gemma":
        """Loads a model.

        Args:
          checkpoint: A run directory, one of its steps, a Hugging Face directory, a published Flax
            directory, a GGUF file, a name on the Hub such as google/gemma-2b-it, or `random:PRESET` for
            random weights of a preset (docs/checkpoints.md).
          mesh: How to split the model over the devices; by default all devices are on the fsdp axis.
          compute: How to execute the model.
          dtype: The dtype of the parameters in memory, instead of compute.param_dtype. Without either they
            are kept in bfloat16 if the checkpoint stores them so, otherwise in float32.
          instruction_tuned: Whether the model was trained on dialogues. By default it counts as such if its
            generation_config.json lists `<end_of_turn>` or its name ends in `-it`.
          quantization: Quantises the weights while they are loaded: `int8`, `int4` (blocks of 32),
            `int4:BLOCK`, `int4:channel` or `nf4` (docs/quantisation.md). The embedding becomes int8, unless
            `,embedding=dense` follows. Empty loads them as they are stored.
          adapters: Adapters (LoRA) over these weights, by the names with which calls choose them: runs that
            trained adapters, PEFT directories or names on the Hub. If `checkpoint` is itself an adapter, its
            model is loaded, and that adapter is used where a call names none.

        Raises:
          UserError: there is no checkpoint, it is damaged, the preset does not exist, the dtype is neither
            float32 nor bfloat16, or an adapter belongs to other weights.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"dtype is {dtype!r}, but parameters are kept as float32 or bfloat16.")
        found = open_checkpoint(checkpoint)
        kind = found.kind(quantization)
        device_mesh = make_mesh(mesh or MeshConfig())
        compute = compute or ComputeConfig(param_dtype="auto")
        compute = found.compute(replace(compute, {"param_dtype": dtype} if dtype else {}))
        keep_programs(compute.compilation_cache, PROGRAMS)
        tokenizer = found.tokenizer()  # before the weights, so that its errors are reported at once
        ends = found.end_tokens(instruction_tuned)
        spec = ModelSpec(found.config, compute, device_mesh, kind)
        named = {"": found.adapter()} if found.adapter else {}
        named |= {name: open_adapter(place, found.config) for name, place in (adapters or {}).items()}
        params = found.params(spec)
        if named:
            spec, params = with_adapters(spec, params, [*named.values()])
        return cls(spec, params, tokenizer, ends, found.terms_source, [*named])

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        format: Literal["huggingface", "flax", "run", "gguf"] = "huggingface",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        quantization: str = "",
    ) -> None:
        """Writes the weights, and the tokenizer if there is one, in a format that other programs can read.

        Args:
          path: A directory that does not exist yet or is empty.
          format: Hugging Face's safetensors and config.json, the published Flax format, a run directory
            with a checkpoint at step 0, or a GGUF file for llama.cpp.
          dtype: The dtype in the files; by default that of the parameters in memory. A GGUF file always has
            bfloat16 unless it is quantised.
          quantization: Quantises the weights in the files: int8 (q8_0) or int4 (q4_0) for gguf, nf4 for
            huggingface, any kind for a run. Empty writes them as they are.

        Raises:
          UserError: the directory is not empty, the disk is full, values are not finite in this dtype, or the
            format does not have this dtype or quantization.
        """
        if self._adapters:
            raise UserError(
                "this model has adapters; merge one with `gemma convert --merge`, or save it as peft."
            )
        if quantization and self._quantization:
            raise UserError(
                f"the weights are quantised already, as {self._quantization}; leave out quantization "
                f"{quantization}, or load the original weights."
            )
        from gemma_jax.pretrained.export import PlacedWeights, export  # imported here: orbax takes a second

        export(
            path,
            format,
            PlacedWeights(self.params, self.spec),
            self.config,
            dtype=dtype or ("" if format == "gguf" else self.compute.param_dtype),
            quantization=quantization,
            end_tokens=self.end_tokens,
            tokenizer=self._tokenizer,
            terms_source=self._terms_source,
        )

    def __repr__(self) -> str:
        count = sum(math.prod(about.stacked_shape) for about in parameter_table(self.config).values())
        dtype = self._quantization or self.compute.param_dtype
        kind = "instruction-tuned" if self.instruction_tuned else "pretrained"
        where = f"{platform(self.mesh)}, mesh {mesh_text(self.mesh.shape)}"
        tokenizer = "" if self._tokenizer else ", no tokenizer"
        tokenizer += f", {len(self._adapters)} adapters" * bool(self._adapters)
        return (
            f"<Gemma, {kind}: {count:,} parameters in {dtype} on {where}; "
            f"context of {self.config.context_length} tokens{tokenizer}>"
        )

    @property
    def _quantization(self) -> str:
        """The kind of the weights; empty if they are dense."""
        kind = base_spec(self.spec).kind
        return str(kind) if isinstance(kind, Quantization) else ""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          UserError: the checkpoint has no tokenizer.
        """
        if self._tokenizer is None:
            raise UserError("this model has no tokenizer.model beside it; pass token ids instead of text.")
        return self._tokenizer

    @property
    def instruction_tuned(self) -> bool:
        """Whether the model was trained on dialogues, so that `<end_of_turn>` ends its answers."""
        return END_OF_TURN in self.end_tokens

    def chat(
        self,
        *,
        system: str = "",
        history: Sequence[Message] = (),
        adapter: str | None = None,
        config: SamplingConfig | None = None,
        **settings: Any,
    ) -> Chat:
        """Starts or continues a dialogue that keeps its history.

        Args:
          system: An instruction, put in front of the first user turn because Gemma has no system turn.
          history: The messages `{"role": ..., "content": ...}` of an earlier dialogue to continue.
          adapter: As for `generate`.
          config, **settings: As for `generate`, except samples; they hold for every answer. Without a config,
            max_new_tokens is 1024.

        Raises:
          UserError: the model is not known to be instruction-tuned, has no tokenizer, or a setting is wrong.
        """
        if not self.instruction_tuned:
            raise UserError(
                "this model is not known to be instruction-tuned: its generation_config.json lists no "
                "<end_of_turn> (107) and its name does not end in -it; load it with instruction_tuned=True "
                "(--instruction_tuned yes) if it is."
            )

        config = sampling_config(config or SamplingConfig(MAX_NEW_TOKENS), settings)
        pieces = functools.partial(self._pieces, adapter=adapter, keep=True)
        return Chat(self.tokenizer, pieces, self.config.context_length, system, history, config)

    def logits(
        self,
        token_ids: Sequence[Sequence[int]] | np.ndarray,
        *,
        adapter: str | Sequence[str] | None = None,
    ) -> np.ndarray:
        """Returns the logits of the token after each position.

        Args:
          token_ids: [B, L] integers; all rows have the same length.
          adapter: As for `generate`.

        Returns:
          [B, L, vocab_size] float32.

        Raises:
          UserError: rows differ in length or are longer than the context, or an id is out of range.
        """
        rows = self._ids(token_ids)
        for row in rows:
            check_ids(row, self.config)
        if len(lengths := set(map(len, rows))) != 1:
            raise UserError(
                f"the rows of token_ids have the lengths {sorted(lengths)}; call once for each length."
            )
        parts = row_parts(self.mesh)
        tokens, _ = padded(rows, -(-len(rows) // parts) * parts, *lengths)
        chosen = [*indices_of(self._adapters, adapter, len(rows)), *[-1] * (len(tokens) - len(rows))]
        return np.asarray(self._logits(self.params, tokens, np.array(chosen)))[: len(rows)]

    def score(
        self, texts: Sequence[str | Sequence[int]], *, adapter: str | Sequence[str] | None = None
    ) -> list[list[float]]:
        """Returns the log-probability of each token given those before it, in nats.

        Args:
          texts: Texts, to which `<bos>` is prepended, or token ids, which are used unchanged.
          adapter: As for `generate`.

        Returns:
          One list per entry: the values of all tokens of a text, or of all token ids except the first, which
          has no token before it.

        Raises:
          UserError: there is text but no tokenizer, an entry is empty or longer than the context, or an id is
            out of range.
        """
        ids = self._ids(texts)
        return self._scorer.score(ids, indices_of(self._adapters, adapter, len(ids)))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        adapter: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> list[Generation]:
        """Continues prompts of any lengths.

        Args:
          prompts: Texts, to which `<bos>` is prepended and in which nothing becomes a control token, or
            token ids, which are used unchanged.
          config: How tokens are chosen, and when a continuation ends; or a config for each prompt.
          adapter: The name of an adapter that the model was loaded with, or a name for each prompt; "" is the
            model without an adapter. By default the model's own adapter, if it was loaded as one.
          **settings: Fields of SamplingConfig, which override those of config. docs/sampling.md explains
            them: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, logit_bias,
            forbidden_tokens, seed, samples, stop, end_tokens, prompt_lookup, top_log_probs,
            prompt_log_probs, batch_size.

        Returns:
          One generation for each sample of each prompt; all samples of one prompt are adjacent.

        Raises:
          UserError: there is text but no tokenizer, a prompt is empty or fills the context, an id is out of
            range, a setting has a wrong type or value, there is not one config for each prompt, or the
            continuations do not fit into memory.
        """
        requests = self._requests(prompts, config, adapter, settings)
        if not requests:
            return []
        completions = [self._completion(request.config) for request in requests]
        for _ in complete_requests(
            self._generator, requests, completions, rows=requests[0].config.batch_size
        ):
            pass
        of_prompts = self._scorer.prompts(r for r in requests if r.config.prompt_log_probs)
        return [
            Generation.of(completion, of_prompts.get(request.prompt, []))
            for request, completion in zip(requests, completions, strict=True)
        ]

    def _requests(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: SamplingConfig | Sequence[SamplingConfig] | None,
        adapter: str | Sequence[str] | None,
        settings: Mapping[str, Any],
    ) -> list[Request]:
        """Returns the requests of a call of `generate`, which also describes the errors."""
        ids = self._ids(prompts)
        configs = sampling_configs(config, settings, len(ids))
        adapters = indices_of(self._adapters, adapter, len(ids))
        if ids:
            self._generator.check_memory(ids, configs)
        return requests_of(ids, configs, self.end_tokens, adapters)

    def stream(
        self,
        prompt: str | Sequence[int],
        config: SamplingConfig | None = None,
        *,
        adapter: str | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yields the continuation of one prompt, piece by piece as it is generated.

        Args:
          prompt: A text or token ids.
          config, adapter, **settings: As for `generate`, except samples.

        Yields:
          Pieces whose concatenation is the text that `generate` returns. Bytes of an incomplete character,
          and text that may be the beginning of a stop text, are held back until it is clear what follows.

        Raises:
          UserError: as `generate`, and for a model without a tokenizer.
        """
        config = sampling_config(config or SamplingConfig(), settings)
        return (piece for piece, _ in self._pieces(prompt, config, adapter) if piece)

    def _pieces(
        self,
        prompt: str | Sequence[int],
        config: SamplingConfig,
        adapter: str | None = None,
        *,
        keep: bool = False,
    ) -> Iterator[tuple[str, FinishReason | None]]:
        """Returns an iterator over pieces of a continuation, some empty; the last has the finish reason."""
        validate_stream(config)
        completion = TextCompletion(self.tokenizer, config.stop)
        requests = self._requests([prompt], config, adapter, {})
        looks = complete_requests(self._generator, requests, [completion], watched=True, keep=keep)
        return ((completion.take(), completion.finish_reason) for _ in looks)

    def _completion(self, config: SamplingConfig) -> Completion:
        without_text = self._tokenizer is None and not config.stop
        return Completion() if without_text else TextCompletion(self.tokenizer, config.stop)

    def _ids(self, prompts: Iterable[str | Sequence[int]]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise UserError("a text stands where a list of them must be; put it into one.")
        return [self._prompt_ids(prompt) for prompt in prompts]

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt, turn=False)
        if isinstance(prompt, bytes | bytearray):
            raise UserError("a prompt is bytes, but must be a text or a list of token ids; decode it first.")
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UserError(f"a prompt must be a text or a list of integer token ids ({error}).") from error
