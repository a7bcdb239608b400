"""Serving: many requests in one denoising batch, with their texts as they are decoded."""

from .request import Answer, Event, Failure, Progress, Request
from .server import Limits, Server, ServerBusy, Ticket

__all__ = ["Answer", "Event", "Failure", "Limits", "Progress", "Request", "Server", "ServerBusy", "Ticket"]
