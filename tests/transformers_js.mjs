// Runs an export in transformers.js: node transformers_js.mjs FOLDER NAME IMAGE PIXELS
// Prints a line of JSON for each precision: the predictions for the image as transformers.js resizes it and as
// docs/export.md does, and the logits of pixels that Python has read.
import { readFileSync } from "node:fs";
import { AutoModelForImageClassification, env, pipeline, RawImage, Tensor } from "@huggingface/transformers";
import sharp from "sharp";

const [folder, name, image, pixels] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const { buffer, byteOffset, length } = readFileSync(pixels);
const pixel_values = new Tensor("float32", new Float32Array(buffer, byteOffset, length / 4), [1, 3, 224, 224]);
const { width, height } = await sharp(image).metadata();
const scale = 256 / Math.min(width, height);
const { data, info } = await sharp(image)
  .removeAlpha()
  .resize({ width: Math.floor(scale * width), height: Math.floor(scale * height), fit: "fill", kernel: "linear" })
  .raw()
  .toBuffer({ resolveWithObject: true });
const resized = new RawImage(new Uint8ClampedArray(data), info.width, info.height, info.channels);
for (const dtype of ["fp32", "q8"]) {
  const classify = await pipeline("image-classification", name, { dtype, device: "cpu" });
  const answers = await classify(image, { top_k: 3 });
  const answers_when_resized = await classify(resized, { top_k: 3 });
  const model = await AutoModelForImageClassification.from_pretrained(name, { dtype, device: "cpu" });
  const { logits } = await model({ pixel_values });
  console.log(JSON.stringify({ dtype, answers, answers_when_resized, logits: Array.from(logits.data) }));
}
