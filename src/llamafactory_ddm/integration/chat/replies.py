"""The API's answers: OpenAI's objects, whole or in chunks, with `diffusion` as an extension that clients ignore."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...serving.request import Answer, Progress

logger = logging.getLogger(__name__)


@dataclass
class Reply:
    """The answer to one request.

    Attributes:
        is_chat: whether it answers a chat, else it completes a text.
        model: the name that the client uses.
        seed: of the random draws.
        extract: returns the calls of tools in a text, or the text; None without tools.
        shows_whole: whether the whole text of a completion, with its gaps filled, is wanted.
    """

    is_chat: bool
    model: str
    seed: int
    extract: Callable[[str], Any] | None = None
    shows_whole: bool = False
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    # ---- whole ----

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the response with all answers."""
        choices = []
        for answer in answers:
            message, reason = self._message(answer)
            content = {"message": {"role": "assistant", **message}} if self.is_chat else {"text": answer.text}
            choices.append({"index": answer.sample, **content, "logprobs": None, "finish_reason": reason})
            if self.shows_whole:
                choices[-1]["infilled_text"] = answer.whole
        return {**self._head(""), "choices": choices, "usage": usage(answers), "diffusion": self._costs(answers)}

    def _message(self, answer: Answer) -> tuple[dict[str, Any], str]:
        """Return the message of a chat, and why it ended."""
        found = self._calls(answer.text)
        if not found:
            return {"content": answer.text}, answer.finish_reason
        calls = [
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in found
        ]
        return {"content": None, "tool_calls": calls}, "tool_calls"

    def _calls(self, text: str) -> Sequence[Any]:
        """Return the calls of tools in a text; none where the model wrote something that is not quite one."""
        if self.extract is None:
            return []
        try:
            found = self.extract(text)
        except Exception as error:  # noqa: BLE001  some of LLaMA-Factory's fail, say for an answer that is "5"
            logger.debug("no call of a tool in %r: %s", text, error)
            return []
        is_calls = isinstance(found, list) and all(isinstance(call.name, str) for call in found)
        return found if is_calls else []

    def _costs(self, answers: Sequence[Answer]) -> dict[str, Any]:
        passes = sum(answer.num_forward_passes for answer in answers)
        tokens = sum(answer.completion_tokens for answer in answers)
        return {
            "seed": self.seed,
            "forward_passes": passes,
            "tokens_per_forward_pass": round(tokens / passes, 3) if passes else 0.0,
        }

    # ---- in chunks ----

    def first_chunks(self, n: int) -> list[str]:
        """Return the chunks that open the choices of a chat."""
        return [self._chunk(i, {"role": "assistant", "content": ""}, "") for i in range(n)] if self.is_chat else []

    def progress_chunk(self, progress: Progress) -> str | None:
        """Return the chunk of a step; None for a step without news."""
        # Calls of tools are told from other text once it is complete.
        text = progress.text if self.extract is None else ""
        if not text and progress.canvas is None:
            return None
        extension = None
        if progress.canvas is not None:
            extension = {"step": progress.step, "canvas": list(progress.canvas)}
        return self._chunk(progress.sample, {"content": text} if text else {}, text, extension=extension)

    def last_chunks(self, answer: Answer) -> list[str]:
        """Return the chunks that end a choice."""
        message, reason = self._message(answer)
        chunks = []
        if "tool_calls" in message:
            calls = [{"index": number, **call} for number, call in enumerate(message["tool_calls"])]
            chunks.append(self._chunk(answer.sample, {"tool_calls": calls}, ""))
        elif self.extract is not None and message["content"]:
            chunks.append(self._chunk(answer.sample, {"content": message["content"]}, message["content"]))
        extension = self._costs([answer])
        if self.shows_whole:
            extension["infilled_text"] = answer.whole
        return [*chunks, self._chunk(answer.sample, {}, "", reason=reason, extension=extension)]

    def usage_chunk(self, answers: Sequence[Answer]) -> str:
        """Return the last chunk of a stream whose client asks for usage."""
        return _dump(
            {**self._head(".chunk"), "choices": [], "usage": usage(answers), "diffusion": self._costs(answers)}
        )

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        text: str,
        *,
        reason: str | None = None,
        extension: dict[str, Any] | None = None,
    ) -> str:
        content = {"delta": delta} if self.is_chat else {"text": text}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        more = {} if extension is None else {"diffusion": extension}
        return _dump({**self._head(".chunk"), "choices": [choice], **more})

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Return the numbers of tokens; the prompt counts once, whatever the number of answers."""
    prompt = max((answer.prompt_tokens for answer in answers), default=0)
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _dump(chunk: dict[str, Any]) -> str:
    return json.dumps(chunk, ensure_ascii=False)
