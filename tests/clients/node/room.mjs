// What the scripts share. They are given the server's address, the model and a question.
import { z } from "zod";

export const [baseURL, model, asked] = process.argv.slice(2);
export const city = z.object({ name: z.string().max(8), size: z.number().int().min(0).max(999) });

const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 8 } },
  required: ["city"],
  additionalProperties: false,
};
export const tools = [{ type: "function", function: { name: "weather", parameters } }];

export const tell = (name, value) => console.log(JSON.stringify([name, value]));
