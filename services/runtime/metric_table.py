"""docs/metrics.md, made from the definitions: python -m services.runtime.metric_table > docs/metrics.md"""

from services.runtime.metric_definitions import METRICS, Definition

_HEAD = """# Metrics

Every process serves its own at `/metrics`, on its HTTP address and without a token. Made from
`services/runtime/metric_definitions.py` by `python -m services.runtime.metric_table`; what to do with them is in
[monitoring.md](monitoring.md).

A histogram has `_bucket`, `_sum` and `_count` behind its name. Label values that are listed are there from the start; a
gauge that has no figure yet, or none for the last step, is NaN. Beside these, every process has Python's `process_` and
`python_` metrics, and a rollout worker with vLLM those of vLLM, which begin with `vllm:`.
"""


def document() -> str:
    parts = [_HEAD]
    for service, metrics in METRICS.items():
        parts.append(f"\n## {service}\n\n| name | type | unit | labels | meaning |\n|---|---|---|---|---|\n")
        parts += [_row(each) for each in metrics]
    return "".join(parts)


def _row(metric: Definition) -> str:
    labels = "; ".join(
        f"`{name}`: {values if isinstance(values, str) else ', '.join(values)}"
        for name, values in metric.labels.items()
    )
    buckets = ", ".join(f"{each:g}" for each in metric.buckets)
    meaning = (f"{metric.help} (buckets {buckets})" if buckets else metric.help).replace("|", r"\|")
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {meaning} |\n"


if __name__ == "__main__":
    print(document(), end="")
