// Greedy text with transformers.js: node generate.mjs FOLDER REQUEST
// REQUEST is JSON, {"prompts": [[ids], ...], "count": n, "messages": [...] or null, "texts": [...]}; the answer is one
// line of JSON: what was generated after each prompt, the rendered chat, the ids of the texts.
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

const [folder, request] = process.argv.slice(2);
const { prompts, count, messages, texts } = JSON.parse(request);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const generated = [];
for (const prompt of prompts) {
  const input_ids = new Tensor("int64", BigInt64Array.from(prompt.map(BigInt)), [1, prompt.length]);
  const attention_mask = new Tensor("int64", new BigInt64Array(prompt.length).fill(1n), [1, prompt.length]);
  const output = await model.generate({ input_ids, attention_mask, max_new_tokens: count, do_sample: false });
  generated.push(output.tolist()[0].slice(prompt.length).map(Number));
}
const chat = messages && tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
const ids = texts.map((text) => tokenizer(text).input_ids.tolist()[0].map(Number));
console.log(JSON.stringify({ generated, chat, ids }));
