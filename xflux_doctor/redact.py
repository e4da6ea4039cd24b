"""What must not leave this machine taken out of texts and documents: secrets always, names of people and hosts on top.

Three nets, one behind the other: what keys of known services look like, what stands behind a name that says that it is
a secret, and the very values that are secret on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

GONE = "***"
_BEGIN = r"(?<![A-Za-z0-9])"
# Sources: the services' own documents, and the rules of detect-secrets and gitleaks for the same kinds.
_SHAPES = (
    ("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----|[\s\S]*)"),
    ("Hugging Face token", rf"{_BEGIN}(?:hf|api_org)_[A-Za-z0-9]{{8,}}"),
    ("GitHub or GitLab token", rf"{_BEGIN}(?:gh[pousr]_[A-Za-z0-9_-]{{16,}}|github_pat_\w{{16,}}|glpat-[\w-]{{16,}})"),
    ("Weights & Biases key", rf"{_BEGIN}(?:wandb_v\d_\w{{16,}}|(?:local-)?[0-9a-f]{{40}}(?![0-9a-f]))"),
    ("AWS key", rf"{_BEGIN}(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{{16}}(?![A-Z0-9])"),
    ("Google key", rf"{_BEGIN}(?:AIza[\w-]{{35}}|ya29\.[\w-]{{16,}}|GOCSPX-[\w-]{{16,}})"),
    ("service key", rf"{_BEGIN}(?:sk|pk|rk|pypi|npm|dckr_pat|nvapi|r8|xox[abposr]|SG|comet|neptune)[-_.][\w.-]{{16,}}"),
    ("web hook", r"(?<=hooks\.slack\.com/)[\w/-]{8,}|(?<=discord\.com/api/webhooks/)[\w/-]{8,}"),
    ("JSON web token", rf"{_BEGIN}eyJ[\w-]{{8,}}\.[\w-]{{8,}}(?:\.[\w-]*)?"),
)
_WORD = (
    r"(?:token|secret|passw(?:or)?d|passwd|(?<=[-_])pwd|passphrase|api[-_ ]?key|access[-_ ]?key(?:[-_]?id)?"
    r"|private[-_]?key|account[-_]?key|auth[-_]?key|credentials?|signature|license[-_]?key|wandb[-_]?key|connection[-_]?string)"
)
_NAME = re.compile(rf"(?:^|[-_.\s]){_WORD}$|^(?:auth|key|pat|sig|hf|wandb)[-_]?(?:token|key)$", re.IGNORECASE)
"""A key of a document whose value is a secret; `max_text_tokens` and `tokenizer` are none."""
_UPPER = r"[A-Z0-9_]*(?:TOKEN|SECRET|PASS|PASSW(?:OR)?D|PASSPHRASE|KEY|CREDENTIALS?|WEBHOOK(?:_URL)?|_PAT|AUTH)"
"""The same of a variable, whose name says less by habit."""
_LOGIN = re.compile(r"(?<=://)[^/@\s'\"<>]+(?=@)")
_HEADER = re.compile(
    r"(?i)((?:proxy-)?authorization|x-api-key|x-auth-token|x-amz-security-token|(?:set-)?cookie)(\\?[\"']?\s*[:=]\s*\\?[\"']?)"
    r"[^\r\n\"']+"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}")
_PLAIN = r"(?!(?:true|false|null|none|yes|no|\*+|-?\d+(?:\.\d+)?)(?:[\s,;&)}\]\"']|$))"
_ASSIGNED = re.compile(
    rf"((?i:(?:[\w.-]*[-_.])?{_WORD})\\?[\"']?\s*(?:=>|=|:)\s*|\b{_UPPER}\\?[\"']?\s*[=:]\s*|(?i:{_WORD}\s+(?:is|was)\s+)(?=\S*\d))"
    rf"{_PLAIN}(\\?\"[^\"\r\n]*\"|\\?'[^'\r\n]*'|\\?[\"']?[^\s\"'&,;)}}\]\\]{{4,}})"
)
_AT = r"(?:\d+: )?(?:\[\w+ ?\d*\]:? )?"
"""What an excerpt and a launcher put before a line."""
_WHOLE = re.compile(
    rf"(?im)^({_AT}\s*(?:-\s+)?[\"']?(?:[\w.-]*[-_.])?{_WORD}[\"']?\s*:[ \t]+){_PLAIN}(?![{{\[\"'])(\S[^\r\n]*)"
)
"""A value of YAML, which may have spaces."""
_FLAG = re.compile(rf"(?i)(--?(?:[\w.]+[-_.])?{_WORD}[ =]){_PLAIN}(\"[^\"\r\n]*\"|'[^'\r\n]*'|[^\s\"'-][^\s\"']{{3,}})")
_QUERY = re.compile(
    r"(?i)([?&](?:sig|signature|key|token|x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|policy|key-pair-id)=)[^&\s\"'<>]+"
)
_NETRC = re.compile(r"(?i)(\b(?:machine\s+\S+\s+)?login\s+)\S+(\s+password\s+)\S+")
_CURL = re.compile(
    r"(\bcurl\b[^\r\n]*?\s(?:-[a-zA-Z]*[uU]|--user|--proxy-user)(?:\s*|\s*=)[\"']?)(?=[^\s\"':]*:[^\s\"'])"
    r"(?:(?<=\")[^\"\r\n]+|(?<=')[^'\r\n]+|[^\s\"']+)"
)
"""User and password of curl's own flags (curl manual, -u and -U)."""
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_BASE64 = re.compile(
    r"(?<![\w/+=.-])(?=[A-Za-z0-9/+]*[a-z])(?=[A-Za-z0-9/+]*[A-Z])(?=[A-Za-z0-9/+]*\d)[A-Za-z0-9/+]{40}(?![\w/+=.-])"
)
"""An AWS secret key stands alone in a line as often as behind its name."""
_BLOCK = re.compile(rf"(?m)^({_AT}[ \t]*)[A-Za-z0-9/+]{{50,}}={{0,2}}[ \t]*$")
"""Lines of a key whose first line is not there."""
_HOMES = re.compile(r"(/(?:home|Users|export/home|mnt/home|nfs/home)/|\b[A-Za-z]:\\{1,2}Users\\{1,2})([^/\\\s:\"',;]+)")
_EVERYBODY = frozenset({"root", "user", "ubuntu", "admin", "nobody", "runner", "jovyan", "home", "train", "python"})
_LEAST = 6
"""Letters of a value that is looked for everywhere: a shorter one is part of other words."""
_FORMS = tuple((kind, re.compile(pattern)) for kind, pattern in _SHAPES)


def secret_name(name: str) -> bool:
    """Whether a variable or key of that name holds a secret."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(_NAME.search(spaced) or re.fullmatch(_UPPER, name))


@dataclass
class Redactor:
    """Takes secrets out, and counts what it took. `values`: texts that are secrets here, whatever they look like."""

    values: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of people and hosts, and what stands for each; empty: they stay."""
    people: bool = False
    """Whether home folders and mail addresses go too."""
    counts: dict[str, int] = field(default_factory=dict)

    def text(self, text: str) -> str:
        """The text without secrets, line ends as they were."""
        for value in sorted(self.values, key=len, reverse=True):
            if len(value) >= _LEAST and value in text:
                self._count("value of a secret variable", text.count(value))
                text = text.replace(value, GONE)
        for kind, form in _FORMS:
            text = self._sub(kind, form, GONE, text)
        text = self._sub("login in a URL", _LOGIN, GONE, text)
        text = self._sub("header", _HEADER, rf"\1\2{GONE}", text)
        text = self._sub("header", _BEARER, rf"\1\2{GONE}", text)
        text = self._sub("signed URL", _QUERY, rf"\1{GONE}", text)
        text = self._sub("value behind a secret's name", _FLAG, rf"\1{GONE}", text)
        text = self._sub("value behind a secret's name", _WHOLE, rf"\1{GONE}", text)
        text = self._sub("value behind a secret's name", _ASSIGNED, rf"\1{GONE}", text)
        text = self._sub("login", _CURL, rf"\1{GONE}", text)
        text = self._sub("login", _NETRC, rf"\1{GONE}\2{GONE}", text)
        return self._private(text) if self.people else text

    def tree(self, value: Any) -> Any:
        """A JSON document without secrets: texts are read, and what stands under a secret's name goes whole."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._under(str(key), inner) for key, inner in value.items()}
        return [self.tree(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _under(self, key: str, value: Any) -> Any:
        if secret_name(key) and isinstance(value, str) and value:
            self._count("value behind a secret's name", 1)
            return GONE
        return self.tree(value)

    def _private(self, text: str) -> str:
        text = self._sub("AWS secret", _BASE64, GONE, text)
        text = self._sub("private key", _BLOCK, rf"\1{GONE}", text)
        text = self._sub("home folder", _HOMES, r"\1USER", text)
        text = self._sub("mail address", _MAIL, GONE, text)
        for name, instead in sorted(self.names.items(), key=lambda item: -len(item[0])):
            form = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")
            text = self._sub("name of a person or host", form, instead, text)
        return text

    def _sub(self, kind: str, form: re.Pattern[str], instead: str, text: str) -> str:
        found, number = form.subn(instead, text)
        self._count(kind, number)
        return found

    def _count(self, kind: str, number: int) -> None:
        if number:
            self.counts[kind] = self.counts.get(kind, 0) + number


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values of variables that hold secrets."""
    named = {value for name, value in environ.items() if secret_name(name) and len(value) >= _LEAST}
    return tuple(sorted(value for value in named if not value.startswith(("/", "~"))))  # the path of one is none


def pseudonyms(users: Iterable[str], hosts: Iterable[str]) -> dict[str, str]:
    """What stands for names in a bundle: hosts keep apart by number, and a name that everybody has stays."""
    found = {name: "USER" for name in users if len(name) > 2 and name.lower() not in _EVERYBODY}
    known = dict.fromkeys(
        name for name in hosts if (len(name) > 2 or name[-1:].isdigit()) and name not in ("localhost", "127.0.0.1")
    )
    return found | {name: f"host{number}" for number, name in enumerate(known)}
