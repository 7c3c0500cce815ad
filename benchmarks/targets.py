"""How the measured ratios stand to what gradient capture and scoring are meant to reach on one thread of a CPU."""

TARGETS = {
    "lean ÷ full, A": (0.68, 0.62),
    "lean ÷ full, B": (0.60, 0.55),
    "none p16 above lean, A": (0.015, 0.007),
    "none p16 above lean, B": (0.015, 0.007),
    "rank-1 p16 above lean, A": (0.015, 0.007),
    "rank-1 p16 above lean, B": (0.015, 0.007),
    "rank-4 p16 above lean, A": (0.03, 0.015),
    "rank-4 p16 above lean, B": (0.03, 0.015),
    "exact p16 ÷ full, A": (0.97, 0.90),
    "exact p16 ÷ full, B": (0.69, 0.65),
    "exact p64 ÷ full, A, the better sketch": (0.97, 0.91),
    "exact ÷ bmm, T 512 p 16, worst shape": (1.15, 1.06),
    "exact countsketch ÷ bmm, worst of all": (1.10, 1.02),
    "float32 ÷ reading them, Q = 1": (1 / 0.90, 1 / 0.97),
    "float16 ÷ reading them, Q = 1": (1 / 0.80, 1 / 0.95),
    "float32 ÷ best mm, Q = 4": (0.65, 0.52),
    "float32 ÷ best mm, Q = 8": (0.45, 0.33),
    "float32 ÷ best mm, Q = 16": (0.55, 0.45),
    "float32 ÷ best mm, Q = 32": (0.72, 0.64),
    "float32 ÷ best mm, Q = 128": (0.90, 0.83),
    "float32 ÷ best mm, Q = 512": (1.03, 0.92),
    "float16 ÷ float32, worst Q": (1.00, 0.98),
    "k = 100 ÷ k = 10, Q = 1": (1.03, 1.01),
    "mixed ÷ plain, float32, Q = 8": (1.12, 1.04),
    "mixed ÷ plain, float32, Q = 32": (1.22, 1.14),
    "mixed ÷ plain, float32, Q = 128": (1.60, 1.50),
    "two threads ÷ one, Q ≥ 32, worst": (0.56, 0.52),
    "int8 ÷ reading them, Q = 1": (1 / 0.70, 1 / 0.90),
    "int8 with rescoring ÷ best mm, Q = 8": (0.32, 0.20),
    "int8 with rescoring ÷ best mm, Q = 32": (0.50, 0.40),
    "int8 with rescoring ÷ best mm, Q = 128": (0.62, 0.52),
    "sign ÷ FAISS, worst Q": (0.60, 0.30),
    "narrow rows, two threads ÷ one, worst": (0.56, 0.52),
    "search from files ÷ bergson, float32": (0.25, 0.25),
    "search from files ÷ bergson, float16": (0.25, 0.25),
    "search from files ÷ faiss, float32": (1.00, 1.00),
    "search from files ÷ faiss, float16": (1.00, 1.00),
    "its memory ÷ bergson, float32": (0.10, 0.10),
    "its memory ÷ bergson, float16": (0.10, 0.10),
    "its memory ÷ faiss, float32": (0.10, 0.10),
    "its memory ÷ faiss, float16": (0.10, 0.10),
}
"""What must be reached, and what would be a record; at most, each."""


def compare(reached: dict[str, float]) -> list[dict[str, object]]:
    """Print the targets that were measured beside their limits, and return them for JSON."""
    print(f"\n{'target':<42} {'reached':>7}  {'must':>7} {'record':>7}")
    rows = []
    for name, value in reached.items():
        must, record = TARGETS[name]
        verdict = "record" if value <= record else "reached" if value <= must else "missed"
        print(f"{name:<42} {value:>7.3f}  ≤ {must:<5.3f} ≤ {record:<5.3f}  {verdict}")
        rows.append({"target": name, "reached": value, "must reach": must, "record": record})
    return rows
