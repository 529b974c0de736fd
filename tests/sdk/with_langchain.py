"""Does langchain-openai chat here, and is its history reused?

Arguments: the base URL (with /v1) and the model. Chat completions, plain and streamed, which resend the history; and
responses by the id of the one before. Then a prompt that is too long must raise LangChain's own error for that.
"""

import sys

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

BASE, MODEL = sys.argv[1], sys.argv[2]
SYSTEM = SystemMessage("You are the host of a small inn by the sea. Answer in one short sentence.")
TURNS = ["My name is Ada and I come from Turin.", "Which rooms face the sea?", "And what is my name?"]


def model(**more) -> ChatOpenAI:
    return ChatOpenAI(base_url=BASE, api_key="none", model=MODEL, temperature=0, max_tokens=24, **more)


def check(way: str, answers: list) -> None:
    known = 0
    for number, answer in enumerate(answers):
        usage = answer.usage_metadata
        cached = usage["input_token_details"]["cache_read"]
        print(f"{way}, turn {number + 1}: {usage['input_tokens']} tokens in, {cached} cached: {answer.text!r}")
        assert answer.text, f"{way}: an empty answer"
        assert number == 0 or cached >= known - 16, f"{way}: {cached} cached of {known} known"
        # Prompt and answer: what a client resends as text must be found as the tokens that it was.
        known = usage["input_tokens"] + usage["output_tokens"] - 1


def resent(chat: ChatOpenAI, stream: bool) -> list:
    history, answers = [SYSTEM], []
    for turn in TURNS:
        history.append(HumanMessage(turn))
        if stream:
            pieces = list(chat.stream(history))
            answer = pieces[0]
            for piece in pieces[1:]:
                answer += piece
        else:
            answer = chat.invoke(history)
        answers.append(answer)
        history.append(answer)
    return answers


check("chat", resent(model(), stream=False))
check("chat, streamed", resent(model(stream_usage=True), stream=True))
check("previous response", resent(model(use_responses_api=True, use_previous_response_id=True), stream=False))

try:
    model().invoke([HumanMessage("inn " * 100_000)])
except ContextOverflowError as error:
    print(f"too long: {type(error).__name__}")
else:
    raise AssertionError("a prompt past the window was answered")
