"""`python -m tests.pure.loadtest.write_schema` writes the published schema of the report anew."""

import json
from pathlib import Path

from pydantic import TypeAdapter

from loadtest.report import Report

if __name__ == "__main__":
    schema = json.dumps(TypeAdapter(Report).json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"
    (Path(__file__).resolve().parents[3] / "docs" / "loadtest-report.schema.json").write_text(schema)
