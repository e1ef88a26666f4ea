"""The scripted server, and replies in the form of MMAU-Pro's judge."""

from tests.chat_server import chat_reply, serve

__all__ = ["chat_reply", "ratings", "serve"]


def ratings(correctness: float, relevance: float, completeness: float, clarity: float, overall: float) -> str:
    return (
        f"CORRECTNESS: {correctness} - so\nRELEVANCE: {relevance} - so\nCOMPLETENESS: {completeness} - so\n"
        f"CLARITY: {clarity} - so\nOVERALL: {overall} - so"
    )
