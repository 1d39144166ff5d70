"""`Gemma`: the object that a notebook holds."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.config import (
    PRESETS,
    ComputeConfig,
    MeshConfig,
    TransformerConfig,
    from_record,
    suggestion,
    validate_model,
)
from gemma_jax.errors import UserError
from gemma_jax.model import abstract_transformer, init_params
from gemma_jax.sampling import Generator, SamplingSettings
from gemma_jax.sampling.generate import FinishReason
from gemma_jax.sharding import make_mesh, shardings
from gemma_jax.tokenizer import Tokenizer

RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the model added to a prompt."""

    text: str  # empty where the model has no tokenizer
    token_ids: list[int]  # without the token that ended it
    log_probs: list[float]  # of each token under the model's own distribution, nats
    finish_reason: FinishReason  # "stop": an end token; "length": max_new_tokens; "context": no room left


class Gemma:
    """A Gemma model on a mesh, with its tokenizer.

    Make one with `Gemma.from_pretrained`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: nnx.State,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        compute: ComputeConfig,
    ) -> None:
        """Args:
        config: shape of the model.
        params: its parameters, on the mesh.
        tokenizer: None leaves the calls that take token ids.
        mesh: that the parameters lie on.
        compute: how to execute.

        Raises:
          UserError: the tokenizer has another vocabulary than the model.
        """
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, but the model a vocabulary of "
                f"{config.vocab_size}; they belong to different models."
            )
        self.config, self.params, self.mesh, self.compute = config, params, mesh, compute
        self._tokenizer = tokenizer
        self._generator = Generator(config, compute, mesh, params)
        graphdef, _ = abstract_transformer(config, compute, mesh)

        def logits(params: nnx.State, tokens: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden = model(tokens, positions, jnp.ones_like(tokens))
            return model.logits(hidden)[..., : config.vocab_size]

        self._logits = jax.jit(logits)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        mesh: MeshConfig | None = None,
        compute: ComputeConfig | None = None,
    ) -> "Gemma":
        """Load a model.

        Args:
          checkpoint: a run directory, one of its steps, or `random:PRESET` for random weights of a preset.
          mesh: how to split it over the devices; all of them on fsdp if left out.
          compute: how to execute it.

        Raises:
          UserError: nothing there, a damaged checkpoint, a preset that does not exist.
        """
        device_mesh = make_mesh(mesh or MeshConfig())
        compute = compute or ComputeConfig()
        name = os.fspath(checkpoint)
        if name.startswith(RANDOM):
            preset = name.removeprefix(RANDOM)
            if preset not in PRESETS:
                raise UserError(
                    f"there is no preset {preset!r}{suggestion(preset, PRESETS)}; "
                    f"the presets are {', '.join(PRESETS)}."
                )
            config = PRESETS[preset]
            return cls(config, init_params(config, compute, device_mesh, seed=0), None, device_mesh, compute)

        # Late: orbax costs a second.
        from gemma_jax.checkpoint import store

        folder, run_dir = store.step_folder(name)
        record = store.run_record(folder)
        config = from_record(record.config, str(folder)).model
        validate_model(config)
        _, abstract = abstract_transformer(config, compute, device_mesh)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings(abstract, device_mesh),
        )
        params = store.load_arrays(folder, {"params": placed}, record)["params"]
        tokenizer = run_dir / "tokenizer.model"
        return cls(
            config, params, Tokenizer.load(tokenizer) if tokenizer.exists() else None, device_mesh, compute
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises:
        UserError: the checkpoint came without one.
        """
        if self._tokenizer is None:
            raise UserError("this model has no tokenizer.model beside it; pass token ids instead of text.")
        return self._tokenizer

    def logits(self, token_ids: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Logits of the token after each position.

        Args:
          token_ids: [B, L] integers, rows of one length.

        Returns:
          [B, L, vocab_size] float32.

        Raises:
          UserError: rows of different lengths, ids out of range, longer than the context.
        """
        try:
            tokens = np.asarray(token_ids)
        except ValueError as error:
            raise UserError(
                "the rows of token_ids have different lengths; call once for each length."
            ) from error
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(
                f"token_ids has shape {tokens.shape} and dtype {tokens.dtype}, but must be [B, L] integers."
            )
        if tokens.shape[1] > self.config.context_length:
            raise UserError(
                f"token_ids has rows of {tokens.shape[1]} tokens, longer than the model's context of "
                f"{self.config.context_length}; shorten them."
            )
        wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if wrong.size:
            raise UserError(
                f"token id {wrong[0]} is out of range; "
                f"the model's ids go from 0 to {self.config.vocab_size - 1}."
            )
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        padded = np.pad(tokens, [(0, -len(tokens) % parts), (0, 0)]).astype(np.int32)
        return np.asarray(self._logits(self.params, padded))[: len(tokens)]

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Generation]:
        """Continue prompts of any lengths, as one batch.

        Args:
          prompts: texts (`<bos>` is put in front, and nothing in them becomes a control token), or
            token ids as they are.
          max_new_tokens: at most this many are added to each.
          temperature: 0 takes the likeliest token.
          top_k: sample among so many likeliest tokens; 0 among all.
          top_p: sample among the likeliest tokens that hold this much probability.
          seed: decides the samples; a prompt's sample depends on its place in the list, not on the others.

        Raises:
          UserError: text without a tokenizer, a prompt that is empty or fills the context, ids out of range.
        """
        settings = SamplingSettings(max_new_tokens, temperature, top_k, top_p, seed)
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        if not ids:
            return []
        ends = [self._tokenizer.eos_id] if self._tokenizer else [1]
        completions = self._generator.generate(ids, settings, ends)
        return [
            Generation(
                self._tokenizer.decode(c.token_ids) if self._tokenizer else "",
                c.token_ids,
                c.log_probs,
                c.finish_reason,
            )
            for c in completions
        ]

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode_typed(prompt)]
        return list(prompt)
