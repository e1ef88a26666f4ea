"""The scripted server for rewards that ask a judge."""

from tests.chat_server import serve

__all__ = ["serve"]
