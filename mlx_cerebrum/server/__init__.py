"""A local web server: OpenAI's API and a chat page, over one copy of the weights.

The way of a request, from HTTP to the first thing its client reads:

1. `listening.Server` takes the connection, within the limits of `connections`. `journal.Journal`
   gives the **request** an id, `security.Guard` asks whether it may come in, `app.Service` calls
   the function of its path.
2. `intake.Intake` checks the body against `schema` (its parts: `bodies`, `talk`) and tokenizes it.
   Each prompt becomes a **job** (`jobs.Job`), which asks for `n` **choices**: texts that answer the
   same prompt.
3. `streaming.RunningRequest` submits the jobs to the `jobs.Engine`.
4. `engine.BatchEngine` queues each job as a **task** (`task.Task`). On its own thread, the only one
   that touches MLX, it starts the task in the `batch.Batch` once there is room. Each checkpoint
   (`holding.Holding`) has a batch of its own; one that is at rest is loaded first (`loader`).
5. The batch makes a sequence of each choice, and lets the `decoding.Decoder` take all sequences
   forward together, whatever their models: a chunk of one prompt and a token of every choice at a
   time. Each is an **event** of its job (`jobs.Reading`, `jobs.Piece`; `jobs.Failed` ends one that
   can't go on). The task hands it to the `RunningRequest`, which keeps it for the event loop.
6. `streaming.StreamResponse` says at once who answers, then sends events as they come;
   `streaming.WholeResponse` sends all at the end. Both send the objects of OpenAI's API that
   `answers` describes.

What could be answered with besides is the shelf's (`menu`).
"""
