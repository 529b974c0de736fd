"""Does the OpenAI Agents SDK chat here, and is its history reused?

Arguments: the base URL (with /v1) and the model. Four ways to keep a conversation, each of three turns: the SDK's
conversations session, a conversation's id, the previous response's id, and the last over a WebSocket; one streamed.
"""

import asyncio
import sys

from agents import Agent, ModelSettings, OpenAIConversationsSession, OpenAIProvider, RunConfig, Runner
from openai import AsyncOpenAI

BASE, MODEL = sys.argv[1], sys.argv[2]
client = AsyncOpenAI(base_url=BASE, api_key="none")
agent = Agent(
    name="Host",
    instructions="You are the host of a small inn by the sea. Answer in one short sentence.",
    model=MODEL,
    model_settings=ModelSettings(temperature=0.0, max_tokens=400),
)
TURNS = ["My name is Ada and I come from Turin.", "Which rooms face the sea?", "And what is my name?"]


def config(websocket: bool = False) -> RunConfig:
    provider = OpenAIProvider(
        openai_client=None if websocket else client,
        base_url=BASE if websocket else None,
        api_key="none" if websocket else None,
        use_responses=True,
        use_responses_websocket=websocket,
    )
    return RunConfig(model_provider=provider, tracing_disabled=True)


def check(way: str, results: list) -> None:
    """Every turn said something, and all later ones found most of their history."""
    for number, result in enumerate(results):
        usage = result.raw_responses[-1].usage
        cached = usage.input_tokens_details.cached_tokens
        print(f"{way}, turn {number + 1}: {usage.input_tokens} tokens in, {cached} cached: {result.final_output!r}")
        assert result.final_output, f"{way}: an empty answer"
        if number > 0:
            before = results[number - 1].raw_responses[-1].usage
            # All that was in the last turn's prompt, but for the part of a block at its end.
            assert cached >= before.input_tokens - 16, f"{way}: {cached} cached of {before.input_tokens} known"


async def with_session() -> list:
    session = OpenAIConversationsSession(openai_client=client)
    results = [await Runner.run(agent, turn, session=session, run_config=config()) for turn in TURNS]
    items = await session.get_items()
    assert len(items) == 2 * len(TURNS), f"{len(items)} items in the session"
    return results


async def with_conversation() -> list:
    conversation = await client.conversations.create()
    return [await Runner.run(agent, turn, conversation_id=conversation.id, run_config=config()) for turn in TURNS]


async def with_previous(websocket: bool) -> list:
    results, previous, run_config = [], None, config(websocket)
    for turn in TURNS:
        results.append(await Runner.run(agent, turn, previous_response_id=previous, run_config=run_config))
        previous = results[-1].last_response_id
    return results


async def streamed() -> list:
    conversation, results = await client.conversations.create(), []
    for turn in TURNS:
        result = Runner.run_streamed(agent, turn, conversation_id=conversation.id, run_config=config())
        deltas = []
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                deltas.append(event.data.delta)
        assert "".join(deltas) == result.final_output, "the deltas are not the answer"
        results.append(result)
    return results


async def main() -> None:
    ways = {"session": with_session, "conversation": with_conversation, "streamed": streamed}
    ways["previous response"] = lambda: with_previous(websocket=False)
    if "--no-websocket" not in sys.argv:
        ways["previous response, WebSocket"] = lambda: with_previous(websocket=True)
    for way, run in ways.items():
        check(way, await run())


asyncio.run(main())
