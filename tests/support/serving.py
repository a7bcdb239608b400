"""Small diffusion models that chat, LLaMA-Factory's ChatModel of them, and their API in a thread of this process."""

import socket
import threading
import time
from contextlib import contextmanager

from transformers import AutoTokenizer

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig

from .chat import save_decoder

CHATML = {"template": "chatml"}


def save_chat_model(folder, *, bos=True, shift=True, block_length=None, canvas=None):
    """Save a random Qwen2 whose tokenizer knows ChatML, as a diffusion model; returns its folder."""
    save_decoder(folder, bos=bos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    DiffusionConfig(
        mask_token="<|mask|>",
        mask_token_id=tokenizer.convert_tokens_to_ids("<|mask|>"),
        shift=shift,
        noise_process="masked",
        uniform_ratio=0.0,
        noise_schedule="linear",
        attention_ratio=1.0,
        attention="full" if block_length is None else "block",
        train_block_length=block_length,
        canvas=canvas,
        train_on_padding=True,
    ).save(folder)
    return folder


@contextmanager
def chat_model(folder, **keys):
    """LLaMA-Factory's ChatModel of a folder, closed at the end."""
    from llamafactory.chat import ChatModel

    model = ChatModel({"model_name_or_path": str(folder), "infer_dtype": "float32", **keys})
    try:
        yield model
    finally:
        if hasattr(model.engine, "close"):
            model.engine.close()


@contextmanager
def running_api(model):
    """The address of a ChatModel's API, served by uvicorn in a thread."""
    import uvicorn
    from llamafactory.api.app import create_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(model), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
