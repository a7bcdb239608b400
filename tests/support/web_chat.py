"""A scripted engine and server in place of a model, and LLaMA-Factory's web chat with them."""

from types import SimpleNamespace

from llamafactory_ddm.serving.request import Answer, Progress, Request


class Server:
    """Answers each request with the same events, all at once."""

    def __init__(self, *events):
        self.events, self.requests, self.cancelled = events, [], 0

    def submit(self, request, on_event):
        self.requests.append(request)
        for event in self.events:
            on_event(event)
        return SimpleNamespace(cancel=self.cancel, is_over=True)

    def cancel(self):
        self.cancelled += 1


class Engine:
    """What the pages use of our engine."""

    def __init__(self, *events, error=None):
        self.server, self.error, self.prepared, self.is_closed = Server(*events), error, [], False
        logits = SimpleNamespace(top_p=0.8, temperature=0.5)
        sampling = {"diffusion_steps": 32, "denoising_strategy": "confidence_threshold", "confidence_threshold": 0.7}
        self.defaults = SimpleNamespace(**sampling, block_length=8, kv_cache=None, logits=logits)
        self.served = SimpleNamespace(chosen=frozenset())
        self.max_new_tokens = 48
        self.template = SimpleNamespace(
            enable_thinking=None, thought_words=("<think>", "</think>"), extract_tool=lambda text: text
        )
        self.tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: ["<eos>"] * len(ids))
        self.generator = SimpleNamespace(eos_ids=(0,))

    def prepare(self, messages, system=None, tools=None, *, images=None, videos=None, audios=None, **overrides):
        self.prepared.append({"messages": list(messages), "system": system, "tools": tools, **overrides})
        self.thinks = self.template.enable_thinking
        if self.error is not None:
            raise self.error
        return Request(canvas=None, settings=None)

    def close(self):
        self.is_closed = True


def answer(text, *, already=""):
    """The last events of a text, of which a part has been sent."""
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "num_forward_passes": 3, "num_steps": 3}
    return Progress(0, 5, text.removeprefix(already)), Answer(0, text, text, finish_reason="stop", **counts)


def chat_model(engine):
    from llamafactory.webui import interface  # noqa: F401  has our class in place of upstream's
    from llamafactory.webui.engine import WebChatModel

    chat = object.__new__(WebChatModel)
    chat.engine, chat.demo_mode = engine, False
    chat.manager = SimpleNamespace(get_elem_by_id=lambda name: name)
    return chat
