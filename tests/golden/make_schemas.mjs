// JSON schemas as zod writes them: `npm install zod@4 && node make_schemas.mjs > schemas_zod.json`
import { z } from "zod";

const node = z.object({ value: z.number(), get children() { return z.array(node); } });
const schemas = {
  recipe: z.object({
    name: z.string(),
    minutes: z.number().int().positive(),
    steps: z.array(z.string()).min(1).max(8),
    vegan: z.boolean().optional(),
  }),
  user: z.object({
    id: z.uuid(),
    email: z.email(),
    born: z.iso.date().nullable(),
    role: z.enum(["admin", "user"]),
  }),
  event: z.discriminatedUnion("type", [
    z.object({ type: z.literal("move"), x: z.number(), y: z.number() }),
    z.object({ type: z.literal("key"), code: z.string() }),
  ]),
  record: z.record(z.string(), z.number()),
  tuple: z.tuple([z.string(), z.number(), z.boolean()]),
  tree: node,
  union: z.object({ v: z.union([z.string(), z.number(), z.null()]), tags: z.array(z.string()) }),
  limits: z.object({
    code: z.string().regex(/^[A-Z]{2}-\d{4}$/),
    score: z.number().min(0).max(1),
    n: z.int().multipleOf(5),
    url: z.url(),
  }),
  strict: z.strictObject({ a: z.string().max(20).default("x"), b: z.literal([1, 2]) }),
  intersection: z.intersection(z.object({ a: z.string() }), z.object({ b: z.number() })),
};
const written = Object.entries(schemas).map(([name, schema]) => [name, z.toJSONSchema(schema)]);
console.log(JSON.stringify(Object.fromEntries(written), null, 1));
