"""Does LlamaIndex chat here, and is its history reused?

Arguments: the base URL (with /v1) and the model. Chat completions, plain and streamed, and responses that are tracked by
the id of the one before.
"""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike

BASE, MODEL = sys.argv[1], sys.argv[2]
SYSTEM = ChatMessage(role="system", content="You are the host of a small inn by the sea. Answer in one short sentence.")
TURNS = ["My name is Ada and I come from Turin.", "Which rooms face the sea?", "And what is my name?"]


def check(way: str, number: int, usage, text: str, known: int) -> int:
    """Returns what the server must know by the next turn."""
    is_chat = hasattr(usage, "prompt_tokens")
    tokens = usage.prompt_tokens if is_chat else usage.input_tokens
    cached = (usage.prompt_tokens_details if is_chat else usage.input_tokens_details).cached_tokens
    print(f"{way}, turn {number + 1}: {tokens} tokens in, {cached} cached: {text!r}")
    assert text, f"{way}: an empty answer"
    assert number == 0 or cached >= known - 16, f"{way}: {cached} cached of {known} known"
    return tokens


def chat(stream: bool) -> None:
    more = {"stream_options": {"include_usage": True}} if stream else {}
    llm = OpenAILike(
        model=MODEL, api_base=BASE, api_key="none", is_chat_model=True, temperature=0, max_tokens=24, additional_kwargs=more
    )
    history, known = [SYSTEM], 0
    for number, turn in enumerate(TURNS):
        history.append(ChatMessage(role="user", content=turn))
        if stream:
            usage, text = None, ""
            for piece in llm.stream_chat(history):
                usage = getattr(piece.raw, "usage", None) or usage
                text = piece.message.content or text
        else:
            answer = llm.chat(history)
            usage, text = answer.raw.usage, answer.message.content
        known = check("chat, streamed" if stream else "chat", number, usage, text, known)
        history.append(ChatMessage(role="assistant", content=text))


def responses() -> None:
    llm = OpenAIResponses(
        model=MODEL,
        api_base=BASE,
        api_key="none",
        temperature=0,
        max_output_tokens=24,
        track_previous_responses=True,
        context_window=4096,
    )
    known = 0
    for number, turn in enumerate(TURNS):
        messages = [SYSTEM] if number == 0 else []
        answer = llm.chat([*messages, ChatMessage(role="user", content=turn)])
        text = answer.message.content or "".join(getattr(block, "text", "") for block in answer.message.blocks)
        known = check("tracked responses", number, answer.raw.usage, text, known)


chat(stream=False)
chat(stream=True)
responses()
