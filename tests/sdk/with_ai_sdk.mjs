// Does the Vercel AI SDK chat here, and is its history reused?
//
// Arguments: the base URL (with /v1) and the model. Three providers: responses and chat of @ai-sdk/openai, and
// @ai-sdk/openai-compatible; plain and streamed.

import assert from 'node:assert/strict';
import { generateText, streamText } from 'ai';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';

const [baseURL, model] = process.argv.slice(2);
const openai = createOpenAI({ baseURL, apiKey: 'none' });
const compatible = createOpenAICompatible({ name: 'here', baseURL, apiKey: 'none', includeUsage: true });
const system = 'You are the host of a small inn by the sea. Answer in one short sentence.';
const turns = ['My name is Ada and I come from Turin.', 'Which rooms face the sea?', 'And what is my name?'];

async function converse(name, chat, streams) {
  const messages = [];
  let known = 0;
  for (const [index, turn] of turns.entries()) {
    messages.push({ role: 'user', content: turn });
    const request = { model: chat, system, messages, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
    let text, usage;
    if (streams) {
      const result = streamText(request);
      text = '';
      for await (const delta of result.textStream) text += delta;
      usage = await result.usage;
    } else {
      ({ text, usage } = await generateText(request));
    }
    const cached = usage.cachedInputTokens ?? usage.inputTokenDetails?.cacheReadTokens ?? 0;
    console.log(`${name}, turn ${index + 1}: ${usage.inputTokens} tokens in, ${cached} cached: ${JSON.stringify(text)}`);
    assert.ok(text, `${name}: an empty answer`);
    if (index > 0) assert.ok(cached >= known - 16, `${name}: ${cached} cached of ${known} known`);
    known = usage.inputTokens;
    messages.push({ role: 'assistant', content: text });
  }
}

for (const streams of [false, true]) {
  const how = streams ? ', streamed' : '';
  await converse(`responses${how}`, openai.responses(model), streams);
  await converse(`chat${how}`, openai.chat(model), streams);
  await converse(`compatible${how}`, compatible(model), streams);
}

// By the id of the response before: only the new message is sent.
let previousResponseId, known = 0;
for (const [index, prompt] of turns.entries()) {
  const { text, usage, providerMetadata } = await generateText({
    model: openai.responses(model), prompt, temperature: 0, maxOutputTokens: 24, maxRetries: 0,
    providerOptions: { openai: { previousResponseId } },
  });
  const cached = usage.cachedInputTokens ?? usage.inputTokenDetails?.cacheReadTokens ?? 0;
  console.log(`previous response, turn ${index + 1}: ${usage.inputTokens} tokens in, ${cached} cached: ${JSON.stringify(text)}`);
  if (index > 0) assert.ok(cached >= known - 16, `previous response: ${cached} cached of ${known} known`);
  known = usage.inputTokens;
  previousResponseId = providerMetadata.openai.responseId;
}
