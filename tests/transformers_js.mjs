// Runs an export in transformers.js: node transformers_js.mjs FOLDER NAME IMAGE PIXELS
// Prints a line of JSON for each precision: the answers to the image, and the logits of pixels that Python has read.
import { readFileSync } from "node:fs";
import { AutoModelForImageClassification, env, pipeline, Tensor } from "@huggingface/transformers";

const [folder, name, image, pixels] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const { buffer, byteOffset, length } = readFileSync(pixels);
const pixel_values = new Tensor("float32", new Float32Array(buffer, byteOffset, length / 4), [1, 3, 224, 224]);
for (const dtype of ["fp32", "q8"]) {
  const classify = await pipeline("image-classification", name, { dtype, device: "cpu" });
  const answers = await classify(image, { top_k: 3 });
  const model = await AutoModelForImageClassification.from_pretrained(name, { dtype, device: "cpu" });
  const { logits } = await model({ pixel_values });
  console.log(JSON.stringify({ dtype, answers, logits: Array.from(logits.data) }));
}
