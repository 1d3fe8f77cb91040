"""What gsm8k_shared.yaml asks of its rows."""

from typing import Any


def questions(rows: Any) -> Any:
    """GSM8K's test rows as `question`, `worked` (the steps to the answer) and `answer` (its number)."""

    def told(row: dict[str, Any]) -> dict[str, str]:
        asked, answered = (message["content"] for message in row["messages"])
        return {"question": asked, "worked": answered.split("\n####")[0], "answer": row["answer"]}

    kept = rows.filter(lambda row: row["source"] == "gsm8k" and row["split"] == "test")
    return kept.map(told, remove_columns=kept.column_names)
