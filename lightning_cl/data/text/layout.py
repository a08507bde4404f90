"""Names in a user's data: finds the columns for prompt, answer and so on, and the key that the records are under."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_cl.data.text.formats import COLUMNS, FORMATS, has_known_format


@dataclass(frozen=True)
class Layout:
    """Layout of a task's records in their files.

    Args:
        columns: known name to name in the data, as ``{"prompt": "Question", "completion": "Answer"}``.
        field: the key under which a ``.json`` file has its list of records; dots separate nested keys.

    Raises:
        ValueError: if `columns` has a name that no format knows.
    """

    columns: tuple[tuple[str, str], ...] = ()
    field: str | None = None

    def __post_init__(self) -> None:
        for meaning, _ in self.columns:
            if meaning not in COLUMNS:
                raise ValueError(f"columns: {meaning!r} is no name that a record can have; there are {sorted(COLUMNS)}")

    @classmethod
    def of(cls, columns: Mapping[str, str] | None, field: str | None) -> Layout:
        """The layout that a task asks for."""
        return cls(tuple((columns or {}).items()), field)

    def meanings(self, names: Collection[Any]) -> dict[Any, str]:
        """The known name for each name in the data; names without a meaning are left out.

        Upper and lower case make no difference, unless another name has the exact spelling.
        """
        found = {given: meaning for meaning, given in self.columns if given in names}
        taken = set(found.values())
        for fits in (lambda name: name, lambda name: str(name).strip().lower()):
            for name in names:
                meaning = fits(name)
                if name not in found and meaning in COLUMNS and meaning not in taken:
                    found[name] = meaning
                    taken.add(meaning)
        return found

    def named(self, record: dict[Any, Any]) -> dict[Any, Any]:
        """A record with the known names; keys without a meaning keep their own."""
        if not self.columns and all(name in COLUMNS or str(name).lower() not in COLUMNS for name in record):
            return record
        meanings = self.meanings(record)
        # If `columns` names another column for a meaning, a column that has the known name itself is left out.
        asked = {meaning for meaning, given in self.columns if given in record}
        return {
            meanings.get(name, name): value for name, value in record.items() if name in meanings or name not in asked
        }

    def check(self, names: Collection[Any], where: str, what: str = "columns") -> None:
        """Checks that the given columns exist, and that the columns make a known format.

        Raises:
            ValueError: if not; the message gives the existing names, and those that would be right.
        """
        missing = [given for _, given in self.columns if given not in names]
        if missing:
            raise ValueError(f"{where}: columns: there is no {missing[0]!r}; the {what} are {list(names)}")
        if not has_known_format(self.meanings(names).values()):
            raise ValueError(
                f"{where}: expected a header row with the columns' names, as of {FORMATS}, got {list(names)}; other"
                " names can be given, as in columns={'prompt': 'Question', 'completion': 'Answer'}"
            )

    def renamed(self, source: Any) -> Any:
        """A ``datasets`` table with the known names; other sources unchanged, since their records are renamed later."""
        if not hasattr(source, "rename_columns") or isinstance(source, (str, list, tuple)):
            return source
        names = source.column_names
        if isinstance(names, dict):  # a DatasetDict
            names = next(iter(names.values()), [])
        meanings = self.meanings(names or [])
        other = {name: meaning for name, meaning in meanings.items() if name != meaning}
        clash = [name for name in other.values() if name in (names or [])]
        source = source.remove_columns(clash) if clash else source
        return source.rename_columns(other) if other else source
