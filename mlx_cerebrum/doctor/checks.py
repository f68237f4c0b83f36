"""All checks of the selftest, in the order they run: first what the others rest on."""

from mlx_cerebrum.doctor import (
    attending,
    buffers,
    kernels,
    packing,
    products,
    racing,
    serving,
    system,
    texts,
)
from mlx_cerebrum.doctor.check import Check
from mlx_cerebrum.model.memory import human

_REPORT = "send this page with a report"
_ATTENTION = ", ".join(f"{most:.1e} in {name}" for name, most in attending.BOUNDS.items())

CHECKS = (
    Check(
        "products",
        "float32 products, dense and packed, are float32's, not TF32's",
        f"relative error below {products.MOST:g} of float64",
        f"unset MLX_ENABLE_TF32; if it is not set, {_REPORT}",
        products.products,
    ),
    Check(
        "attention",
        "attention over dense and packed entries is the definition's, for 1 to 512 queries over up"
        f" to {attending.MOST_KEYS} keys, every mask, heads of 64 to 128, three types",
        f"largest error {_ATTENTION}, of the largest value",
        f"answers can't be trusted here: {_REPORT}, and try another version of mlx",
        attending.attention,
    ),
    Check(
        "text",
        f"a long text past a window of {texts.WINDOW}, told token by token, is what the CPU"
        " computes in one piece (demo model, float32)",
        f"every token, but for ties (two logits within {texts.TIE:g})",
        f"answers can't be trusted here: {_REPORT}, and try another version of mlx",
        texts.long_text,
    ),
    Check(
        "guesses",
        "a text written by guesses that are checked several at a time is what the CPU computes"
        " without (demo model, float32)",
        "every token, but for ties; both ways to guess are used",
        f"leave --draft away: {_REPORT}",
        texts.guessing,
    ),
    Check(
        "caches",
        f"{buffers.STEPS} steps at {buffers.SEEN} tokens copy no cache: they write in place",
        f"peak below {buffers.COPIES} positions' caches",
        f"long answers will be slow and take memory: {_REPORT}",
        buffers.in_place,
    ),
    Check(
        "limits",
        "limits of memory, of kept buffers and of wired memory are put back after work",
        "each as it was",
        f"restart programs that use MLX; {_REPORT}",
        buffers.put_back,
    ),
    Check(
        "quantize",
        "weights packed here are within a step of what was given, and the CPU's",
        f"one step; at most {packing.SHARE:g} of the values another than the CPU's, by one step",
        f"don't convert here with -q: {_REPORT}",
        packing.quantizing,
    ),
    Check(
        "convert",
        "the demo model converted here to 4 bits is what the CPU makes of it, and sound, as is a"
        " copy",
        f"at most {packing.SHARE:g} of the words differ; verify finds nothing",
        f"don't convert here: {_REPORT}",
        packing.converting,
    ),
    Check(
        "window",
        "a request that fills the window takes the memory that was predicted, and no swap",
        f"within {buffers.PREDICTED:.0%} with the weights, and no more than {buffers.PREDICTED:.0%}"
        f" above without; swap grows by {human(buffers.SWAP)} at most",
        "close other programs and run it again; if memory is not as predicted, " + _REPORT,
        buffers.full_window,
    ),
    Check(
        "server",
        f"a server answers {serving.CLIENTS} clients by both models, {serving.REQUESTS} requests"
        f" ({serving.QUICK_REQUESTS} with --quick), and ends in order",
        "all answered, the demo model's alike every time, exit code 0 after SIGTERM",
        f"{_REPORT}; until then: mlx-cerebrum generate",
        serving.serving,
    ),
    Check(
        "pace",
        "prompts are read, and answers written, as fast as by mlx-lm on the same weights",
        f"{racing.LEAST:g} of its pace, each at its best step",
        f"let the machine rest, close other programs, run it again; then {_REPORT}",
        racing.beside_mlx_lm,
    ),
    Check(
        "bandwidth",
        "writing uses what the memory can give",
        f"at most {racing.SHARE:.0%} of what was measured; at least {racing.LARGE_SHARE:.0%} where"
        f" a token reads {human(int(racing.LARGE))} or more",
        f"let the machine rest, close other programs, run it again; then {_REPORT}",
        racing.bandwidth,
    ),
    Check(
        "together",
        "two models over the same weights answer at once no slower than one after the other",
        f"{racing.TOGETHER:g} of the time",
        f"let the machine rest and run it again; then {_REPORT}",
        racing.together,
    ),
    Check(
        "kernels",
        "a position takes no more kernels than mlx-lm's",
        "mlx-lm's number",
        f"{_REPORT}: a slower way through MLX is taken here",
        kernels.kernels,
        {kernels.CAPTURE: "1"},
    ),
    Check(
        "system",
        "macOS answers what is asked of it: chip, memory, swap, staying awake, flushing files",
        "every answer is there, and possible",
        f"{_REPORT}: macOS has changed",
        system.system,
    ),
)
BY_NAME = {check.name: check for check in CHECKS}
