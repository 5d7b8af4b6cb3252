// The official OpenAI client for Node against a running service: `node client.mjs SCENARIO` prints what it saw as JSON.
// The address and the key are in FLEETMIND_URL and FLEETMIND_KEY, the model in FLEETMIND_MODEL.

import OpenAI from "openai";

const { FLEETMIND_URL, FLEETMIND_KEY, FLEETMIND_MODEL: model } = process.env;
const client = new OpenAI({ baseURL: `${FLEETMIND_URL}/v1`, apiKey: FLEETMIND_KEY, maxRetries: 0, timeout: 110_000 });
const messages = [{ role: "user", content: "What is the capital of France? Answer in one sentence." }];
const once = { model, messages, temperature: 0, max_tokens: 12 };

const refusal = (error) => ({
  kind: error.constructor.name,
  status: error.status,
  code: error.code,
  param: error.param,
  near: error.error?.near,
});

const scenarios = {
  async chat() {
    const { data, response } = await client.chat.completions.create(once).withResponse();
    const { message, finish_reason } = data.choices[0];
    return { text: message.content, finish_reason, usage: data.usage, model: response.headers.get("x-fleetmind-model") };
  },

  async stream() {
    const stream = await client.chat.completions.create({
      ...once,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let pieces = 0;
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      pieces += chunk.choices.length;
      usage = chunk.usage ?? usage;
    }
    return { text, pieces, usage };
  },

  async abandon() {
    const stream = await client.chat.completions.create({ ...once, max_tokens: 500, stream: true });
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta?.content) {
        break;
      }
    }
    return { aborted: stream.controller.signal.aborted };
  },

  async models() {
    const names = [];
    for await (const entry of client.models.list()) {
      names.push(entry.id);
    }
    return { names, one: (await client.models.retrieve(model)).id };
  },

  async errors() {
    const far = client.withOptions({ apiKey: "fm_wrong" });
    const long = [{ role: "user", content: "word ".repeat(2000) }];
    const attempts = {
      model: () => client.chat.completions.create({ ...once, model: "SmolLM2-135M" }),
      key: () => far.chat.completions.create(once),
      value: () => client.chat.completions.create({ ...once, max_tokens: -1 }),
      context: () => client.chat.completions.create({ ...once, messages: long }),
      vectors: () => client.embeddings.create({ model, input: "hello" }),
    };
    const seen = {};
    for (const [name, attempt] of Object.entries(attempts)) {
      seen[name] = await attempt().then(() => null, refusal);
    }
    return seen;
  },
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
