"""Serving: one denoising batch for many requests, which sends text while it is decoded."""

from .request import Answer, Event, Failure, Progress, Request
from .server import Limits, Server, ServerBusy, Ticket

__all__ = ["Answer", "Event", "Failure", "Limits", "Progress", "Request", "Server", "ServerBusy", "Ticket"]
