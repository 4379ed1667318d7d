// One forward pass in the WebAssembly build of onnxruntime, as a browser runs it: node run_wasm.mjs FOLDER TOKENS OUT
// TOKENS is a JSON list; the float32 logits of all positions go to the file OUT.
import fs from "node:fs";
import path from "node:path";
import * as ort from "onnxruntime-web";

const [folder, request, out] = process.argv.slice(2);
const tokens = JSON.parse(request);
const place = path.join(folder, "onnx");
const read = (name) => new Uint8Array(fs.readFileSync(path.join(place, name)));
const names = fs.readdirSync(place);
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(read(names.find((name) => name.endsWith(".onnx"))), {
  executionProviders: ["wasm"],
  externalData: names.filter((name) => name.includes("_data")).map((name) => ({ path: name, data: read(name) })),
});
const feeds = {
  input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens.map(BigInt)), [1, tokens.length]),
  attention_mask: new ort.Tensor("int64", new BigInt64Array(tokens.length).fill(1n), [1, tokens.length]),
  position_ids: new ort.Tensor("int64", BigInt64Array.from(tokens.map((_, index) => BigInt(index))), [1, tokens.length]),
};
for (const { name, type, shape } of session.inputMetadata) {
  if (name.startsWith("past")) {
    const empty = type === "float16" ? new Uint16Array(0) : new Float32Array(0);
    feeds[name] = new ort.Tensor(type, empty, [1, shape[1], 0, shape[3]]);
  }
}
const wanted = Object.fromEntries(session.inputNames.map((name) => [name, feeds[name]]));
const { logits } = await session.run(wanted, ["logits"]);
fs.writeFileSync(out, new Uint8Array(logits.data.buffer, logits.data.byteOffset, logits.data.byteLength));
