"""HeadHunter as an application: the search for heads, its log, its report, its command, and head sets as files."""
