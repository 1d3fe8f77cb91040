"""What gsm8k_shared.yaml asks: GSM8K's test questions, wherever the command is given."""

from pathlib import Path
from typing import Any

_TEXTS = Path(__file__).resolve().parents[3] / "shared/text/math_qa.jsonl"


def questions(**_: Any) -> Any:
    """Splits `train` and `test`, their rows `question`, `worked` (the steps to the answer) and `answer` (a number)."""
    from datasets import DatasetDict, load_dataset

    def told(row: dict[str, Any]) -> dict[str, str]:
        asked, answered = (message["content"] for message in row["messages"])
        return {"question": asked, "worked": answered.split("\n####")[0], "answer": row["answer"]}

    rows = load_dataset("json", data_files=str(_TEXTS), split="train")
    rows = rows.filter(lambda row: row["source"] == "gsm8k")
    parts = {name: rows.filter(lambda row, name=name: row["split"] == name) for name in ("train", "test")}
    return DatasetDict({name: part.map(told, remove_columns=rows.column_names) for name, part in parts.items()})
