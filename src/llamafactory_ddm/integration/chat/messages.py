"""The messages and tools of OpenAI's chats, as LLaMA-Factory's engines take them."""

from __future__ import annotations

import json
from typing import Any

from llamafactory.api.chat import _process_request
from llamafactory.api.protocol import ChatCompletionRequest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from .http import ApiError

Chat = tuple[list[dict[str, str]], str | None, str | None]


def read_chat(values: dict[str, Any]) -> Chat:
    """Return messages, system prompt and tools of a chat, converted by LLaMA-Factory's own function.

    Raises:
        ApiError: if they are wrong, or hold anything but text.
    """
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    tools = _tools(values)
    plain = [_plain(number, message) for number, message in enumerate(messages)]
    try:
        request = ChatCompletionRequest(model="", messages=plain, tools=tools)
        chat, system, tools_text, *_ = _process_request(request)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ApiError(400, f"{place}: {fault['msg']}", param=place.partition(".")[0]) from error
    except HTTPException as error:
        roles = "system (or developer) first if at all, then user (or tool) and assistant in turn, user (or tool) last"
        raise ApiError(400, f"messages: {error.detail}; roles must be {roles}", param="messages") from error
    return chat, system, tools_text


def _plain(number: int, message: Any) -> dict[str, Any]:
    """Return a message whose content is one text, and whose role LLaMA-Factory knows."""
    if not isinstance(message, dict):
        raise ApiError(400, f"messages: message {number} must be an object, got {message!r}"[:200], param="messages")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ApiError(
                    400,
                    f"messages: message {number} holds a part of type {kind!r}; this model reads parts of type text "
                    "alone",
                    param="messages",
                )
        content = "".join(part["text"] for part in content)
    if content is None and not calls:
        raise ApiError(400, f"messages: message {number} has no content", param="messages")
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def _tools(values: dict[str, Any]) -> Any:
    """Return the tools that the model may call."""
    tools, choice = values.get("tools"), values.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        given = json.dumps(choice)[:80]
        raise ApiError(
            400, f"tool_choice: {given} is not supported: the model decides; send auto or none", param="tool_choice"
        )
    if tools is not None and not isinstance(tools, list):
        raise ApiError(400, "tools must be a list of functions", param="tools")
    for number, tool in enumerate(tools or ()):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise ApiError(400, f"tools: tool {number} must be of type function, with its function", param="tools")
    return None if choice == "none" else [_complete(tool) for tool in tools or ()] or None


def _complete(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with the description and parameters that OpenAI allows to leave out."""
    function = {name: value for name, value in tool["function"].items() if value is not None}
    parameters = function.get("parameters", {})
    if isinstance(parameters, dict):
        parameters = {"type": "object", "properties": {}, **parameters}
    return {**tool, "function": {"description": "", **function, "parameters": parameters}}
