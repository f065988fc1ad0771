"""An exported encoder-decoder under transformers' `generate()`: the encoder runs once, the decoder token by token."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from qfx.backends.onnx.runner import Runner
from qfx.decoding.encoder_decoder import (
    CROSS,
    DECODER,
    ENCODER,
    ENCODER_MASK,
    HIDDEN,
    IDS,
    MASK,
    POSITIONS,
    read_document,
    whole_mask,
)
from qfx.decoding.generator import Generator, fitting_mask, refuse_unknown
from qfx.decoding.shared_cache import SharedCache
from qfx.errors import explain
from qfx.storage.skeleton import config_of

_ROWS = "rows"  # among the encoder's outputs: which row of which call each of its rows is
_CALLS = itertools.count()


class CrossCache(SharedCache):
    """A decoder's own keys and values, and those of the encoder's states [B, H, T, D], which stay as they are."""

    def __init__(
        self, sizes: list[tuple[int, int]], room: int = 0, dtypes: Sequence[torch.dtype] | None = None
    ) -> None:
        super().__init__(sizes, room, dtypes)
        self.cross: dict[str, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.int64)

    def attend_to(self, states: BaseModelOutput) -> None:
        """Keep the keys and values of the encoder's outputs, unless there are some."""
        if not self.cross:
            prefix = CROSS.partition("{")[0]
            self.cross = {name: tensor for name, tensor in states.items() if name.startswith(prefix)}
            self._rows = states[_ROWS]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order. Beams of one input share what the encoder said: nothing is copied."""
        super().batch_select_indices(indices)
        rows = self._rows[indices]
        if not torch.equal(rows, self._rows):
            self.cross = {name: tensor.index_select(0, indices) for name, tensor in self.cross.items()}
        self._rows = rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.cross = {name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.cross.items()}
        self._rows = self._rows.repeat_interleave(repeats, 0)

    def reset(self) -> None:
        """Forget everything; the memory for tokens is kept."""
        super().reset()
        self.cross = {}


class OnnxEncoder:
    """The encoder of a folder: call it with its inputs by name."""

    def __init__(
        self, path: Path, document: dict[str, Any], config: Any, threads: int | None, entries: Mapping[str, str] | None
    ) -> None:
        self._runner = Runner(path, threads, entries)
        self.main_input_name: str = document["main_input"]
        self._unread, self._config = set(document["unread"]), config
        self.forward = self._named()

    def _named(self) -> Callable[..., BaseModelOutput]:
        """The call with the inputs' names in its signature, by which generate() knows what the encoder takes."""
        names = [*self._runner.inputs, *self._unread]
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)

        def forward(**kwargs: Any) -> BaseModelOutput:
            return self(**kwargs)

        cast(Any, forward).__signature__ = inspect.Signature([*parameters, rest])
        return forward

    def shape(self, name: str) -> list[Any]:
        """The sizes of an input: numbers, and names of those that vary."""
        return next(list(i.shape) for i in self._runner.session.get_inputs() if i.name == name)

    def __call__(self, **kwargs: Any) -> BaseModelOutput:
        """The encoder's states and, as further items, the keys and values that the decoder's layers make of them.

        Raises ValueError for inputs that the file does not have.
        """
        refuse_unknown({n: v for n, v in kwargs.items() if n not in self._runner.inputs and n not in self._unread})
        feeds = {name: kwargs[name] for name in self._runner.inputs if kwargs.get(name) is not None}
        whole = None
        if "attention_mask" not in feeds and self.main_input_name in feeds:
            whole = whole_mask(feeds[self.main_input_name], self._config)
            if "attention_mask" in self._runner.inputs:
                feeds["attention_mask"] = whole
        mask = kwargs.get("attention_mask")
        feeds = {name: tensor.to(self._runner.inputs[name]) for name, tensor in feeds.items()}
        found = self._runner.run(feeds)
        states = BaseModelOutput(last_hidden_state=found.pop(HIDDEN))
        first = next(_CALLS) << 32
        found[_ROWS] = torch.arange(first, first + states[HIDDEN].shape[0])
        if (used := whole if mask is None else mask) is not None:
            found["attention_mask"] = used.long()
        for name, tensor in found.items():
            states[name] = tensor
        return states


class OnnxSeq2SeqLM(Generator):
    """An encoder-decoder's folder. `generate()` is that of transformers; calling it takes and gives what its models
    do."""

    _CACHE = CrossCache

    def __init__(
        self,
        folder: Path,
        document: dict[str, Any],
        config: Any,
        *,
        threads: int | None = None,
        session_options: Mapping[str, str] | None = None,
    ) -> None:
        self.main_input_name = document["main_input"]
        self.encoder = OnnxEncoder(folder / ENCODER, document, config, threads, session_options)
        self._open(folder, config, Runner(folder / DECODER, threads, session_options))

    def get_encoder(self, *_: Any, **__: Any) -> OnnxEncoder:
        """The encoder."""
        return self.encoder

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Tokens of decoders that read places count along a mask that is given, as in transformers."""
        mask = kwargs.get(MASK)
        if POSITIONS in self._runner.inputs and mask is not None and kwargs.get(POSITIONS) is None:
            kwargs[POSITIONS] = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        found: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return found

    def __call__(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None, past_key_values: CrossCache | None = None,
        decoder_position_ids: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Logits [B, S, V] for new tokens [B, S], and the grown cache unless use_cache is False.

        The encoder runs where neither its outputs nor a cache that holds their keys and values are given.
        decoder_attention_mask [B, P + S]: all ones where left out. Raises ValueError for what does not fit.
        """
        if decoder_input_ids is None:
            raise ValueError(explain("decoder_input_ids are needed", next_step="give them, or call generate()"))
        cache = self._cache(past_key_values)
        reads = {n: kwargs.pop(n) for n in list(kwargs) if n in self.encoder._runner.inputs}
        refuse_unknown(kwargs)
        if encoder_outputs is None and not cache.cross:
            given = reads if input_ids is None else {"input_ids": input_ids, **reads}
            encoder_outputs = self.encoder(**given, attention_mask=attention_mask)
        if encoder_outputs is not None:
            cache.attend_to(_checked(encoder_outputs))
            attention_mask = encoder_outputs.get("attention_mask") if attention_mask is None else attention_mask
        batch, new = decoder_input_ids.shape
        mask = fitting_mask(decoder_attention_mask, batch, cache.length + new, "the decoder's attention mask")
        feeds = dict(cache.cross)
        if ENCODER_MASK in self._runner.inputs:
            feeds[ENCODER_MASK] = _encoder_mask(attention_mask, cache).long()
        old = cache.length
        places = torch.arange(old, old + new)[None] if decoder_position_ids is None else decoder_position_ids
        places = places.expand(batch, -1)
        width = 1 if batch > 1 and old else new  # GroupQueryAttention takes one more token of each of several sequences
        logits = []
        for i in range(0, new, width):
            part = slice(i, i + width)
            grown = mask[:, : old + i + width]
            logits.append(self._step(decoder_input_ids[:, part], grown, places[:, part], cache, feeds))
        whole = logits[0] if len(logits) == 1 else torch.cat(logits, 1)
        return Seq2SeqLMOutput(logits=whole, past_key_values=None if use_cache is False else cache)

    forward = __call__

    def _step(self, ids: Tensor, mask: Tensor, places: Tensor, cache: CrossCache, fixed: dict[str, Tensor]) -> Tensor:
        feeds = {**fixed, IDS: ids}
        if MASK in self._runner.inputs:
            feeds[MASK] = mask
        if POSITIONS in self._runner.inputs:
            feeds[POSITIONS] = places
        return self._run(feeds, cache, *mask.shape)


class OnnxWhisper(OnnxSeq2SeqLM, WhisperGenerationMixin):  # type: ignore[misc]
    """Whisper, whose `generate()` reads speech of any length and knows languages, tasks and times."""

    def __init__(self, folder: Path, document: dict[str, Any], config: Any, **options: Any) -> None:
        super().__init__(folder, document, config, **options)
        frames = self.encoder.shape("input_features")[2]
        stride = SimpleNamespace(stride=(frames // config.max_source_positions,))
        convolutions = {"conv1": SimpleNamespace(stride=(1,)), "conv2": stride}
        self.model = SimpleNamespace(config=config, encoder=SimpleNamespace(**convolutions))

    def _postprocess_outputs(self, seek_outputs: Any, **given: Any) -> Any:
        """Results (return_dict_in_generate, thresholds) have no cache: the file's is not split by sequences."""
        if not isinstance(seek_outputs, Tensor):
            left = {name: found for name, found in seek_outputs.items() if name != "past_key_values"}
            seek_outputs = type(seek_outputs)(**left)
        return super()._postprocess_outputs(seek_outputs=seek_outputs, **given)


def _checked(states: Any) -> BaseModelOutput:
    if not isinstance(states, BaseModelOutput) or _ROWS not in states:
        raise ValueError(
            explain(
                "these encoder_outputs lack the keys and values of the cross-attention",
                expected="what the loaded model's encoder gives: model.get_encoder()(...)",
                found=type(states).__name__,
            )
        )
    return states


def _encoder_mask(mask: Tensor | None, cache: CrossCache) -> Tensor:
    if mask is not None:
        return mask
    first = cache.cross[CROSS.format(0, "key")]
    return torch.ones(first.shape[0], first.shape[2], dtype=torch.int64)


def load(
    folder: Path, *, threads: int | None = None, session_options: Mapping[str, str] | None = None
) -> OnnxSeq2SeqLM:
    """Open a folder; `generate()` is the one of the model's class (Whisper has its own).

    Raises ValueError for files that were altered, FileNotFoundError where one is missing.
    """
    document = read_document(folder)
    config = config_of(folder)
    kind = OnnxWhisper if config.model_type == "whisper" else OnnxSeq2SeqLM
    return kind(folder, document, config, threads=threads, session_options=session_options)
