"""Every Redis key, spelled once: type, life, writer, reader.

Scripts receive these spellings as a Lua table made from `LUA_KEYS`, so no key is spelled in two places.
`BOUNDED` lists the keys that live without a TTL, and why each cannot grow for ever.

key                        type    life                         written by              read by
`job:<stage>_in[:high|:low]` stream  an entry until it is settled  submit, settle, promote  stage workers
`job:completion:<id>`      string  setting, 60 s                settle, cancel, expire  gateways, anyone
`job:delayed`              zset    until due                    settle, submit          promote
`job:staged`               zset    batch until it is committed  stage, batch, unstage   unstage, expire
`job:entering`             zset    batch until it has entered   batch, promote          promote, status
`job:promoting`            string  100 ms, renewed              promote                 promote
`job:dead`                 stream  setting, age and count       settle                  `penstock dead`
`job:live`                 zset    id until the job ends        who accepts or ends     expire, admission
`job:stamp`                string  for ever, one number         submit, adopt, revive   submit, adopt, revive
`live:<id>`                hash    until the job ends           submit, settle, ...     all scripts, gateways
`inflight:<tenant>`        set     ids until the job ends       submit, settle          submit
`idem:<hash>`              hash    24 h                         submit, who ends a job  submit, gateways
`reply:<gateway>`          stream  60 s after its gateway       settle, cancel, expire  that gateway
`worker:<consumer>`        string  lease, 10 s                  its worker              all workers, gateways
`workers`                  zset    until seen to be gone        workers                 status, gateways
`gateways`                 zset    lease, 10 s                  gateways, telegram      gateways, status
`llm:replicas`             hash    url until it is dropped      llm workers             gateways, llm workers
`llm:load:<URL>`           string  bounded by replicas          all scripts             anyone
`llm:leases:<URL>`         zset    job id until the job leaves  submit, place, move ... submit, place
`llm:running:<URL>`        zset    job id until the call ends   place, move, settle ... place
`llm:health:<URL>`         hash    1 h after the last call      observe                 place
`record:events`            stream  until the database has them  who accepts or ends     recorder
`record:rows:<batch>`      list    until the database has them  stage, batch, unstage   recorder
`api_keys`                 hash    for ever, revoked ones too   `penstock keys`         gateways
`message:<id>`             string  setting, 7 days              who ends a job          aggregator, gateways, anyone
`batch:<id>`               hash    open; then setting, 7 days   batch, who ends a job   aggregator, gateways, anyone
`batch:members:<id>`       list    as its batch                 stage, batch, unstage   aggregator, gateways, promote
`batch:done:<id>`          set     as its batch                 who ends a job          who ends a job
`batch_results:<id>`       string  setting, 7 days              aggregator              gateways, webhook, anyone
`queue:<queue>`            hash    for ever                     gateways, webhook       gateways, webhook
`msg_queue:<chat>`         list    30 min, renewed              say, who ends a run     chat stage, gateways
`processing_lock:<chat>`   string  10 min: past its run's end   who starts or ends one  chat scripts
`chat:<chat>`              hash    setting, 30 days             chat scripts            chat scripts
`chat_open:<chat>`         hash    as its chat                  chat scripts            chat scripts
`chat_seen:<chat>`         zset    24 h, 1,000 ids              say                     say
`chat_turns:<chat>`        list    as its chat, 50 turns        chat_save               chat stage, gateways
`chat_events:<chat>`       stream  as its chat, about 1,000     chat scripts            gateways
`chat_image:<chat>:<id>`   hash    setting, 24 h                chat_image              gateways
`persona:<name>`           hash    for ever                     gateways                chat stage, say
`personas:<tenant>`        set     for ever, a setting bounds it gateways               gateways
`chat_counts`              hash    for ever, two numbers        chat scripts            gateways
`report_generation_requests` stream an entry until it is taken  any back end            report
`report_generation_responses` stream setting, age and count     report, who ends a job  any back end
`report_request:<id>`      string  as its response              report, who ends a job  report
`report_reply:<id>`        string  as `report_request:<id>`     report                  bridge
`report_counts`            hash    for ever, two numbers        report, who ends a job  gateways
`report:<hash>`            string  setting, 24 h                who ends a job          report
`report_making:<hash>`     string  as long as its job may live  report                  report
`input:<user_id>`          string  setting, 1 h                 who begins a job        report, gateways
`user:<user_id>`           hash    as the last response, longer report, gateways        report, who ends a job
`user_data:<user_id>`      zset    as the longest that it names who begins or ends a job  gateways
`queues:<tenant>`          set     for ever, a setting bounds it gateways, webhook      gateways
`message_queue:<type>`     stream  as `job:<stage>_in`           deliver, settle, promote  delivery stages
`webhook_queue`            stream  as `job:<stage>_in`           incoming               incoming stage
`delivery:<id>`            hash    its job; then setting, 7 days delivery scripts, settle  gateways, delivery stages
`told:<hash>`              string  setting, 2 days               told, incoming         told, incoming
`provider:<name>`          hash    until it may be called again  begin, hold            begin
`telegram:<bot>`           zset    as chats, after their last   telegram connector      telegram connector
`telegram_at:<bot>:<chat>` string  as its chat; `updates`: 1 day telegram connector      telegram connector
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs, urlsplit, urlunsplit

from pipeline.job import DEFAULT_TENANT, Priority

COMPLETION: Final = "job:completion:"
DELAYED: Final = "job:delayed"
STAGED: Final = "job:staged"
ENTERING: Final = "job:entering"
PROMOTING: Final = "job:promoting"
DEAD: Final = "job:dead"
LIVE_INDEX: Final = "job:live"
STAMP: Final = "job:stamp"
LIVE: Final = "live:"
IN_FLIGHT: Final = "inflight:"
IDEMPOTENCY: Final = "idem:"
REPLY: Final = "reply:"
WORKER: Final = "worker:"
WORKERS: Final = "workers"
GATEWAYS: Final = "gateways"
REPLICAS: Final = "llm:replicas"
LOAD: Final = "llm:load:"
LEASES: Final = "llm:leases:"
RUNNING: Final = "llm:running:"
HEALTH: Final = "llm:health:"
EVENTS: Final = "record:events"
ROWS: Final = "record:rows:"
API_KEYS: Final = "api_keys"
MESSAGE: Final = "message:"
BATCH: Final = "batch:"
BATCH_MEMBERS: Final = "batch:members:"
BATCH_DONE: Final = "batch:done:"
BATCH_RESULTS: Final = "batch_results:"
QUEUE: Final = "queue:"
CHAT_QUEUE: Final = "msg_queue:"
CHAT_LOCK: Final = "processing_lock:"
CHAT: Final = "chat:"
CHAT_OPEN: Final = "chat_open:"
CHAT_SEEN: Final = "chat_seen:"
CHAT_TURNS: Final = "chat_turns:"
CHAT_EVENTS: Final = "chat_events:"
CHAT_IMAGE: Final = "chat_image:"
CHAT_COUNTS: Final = "chat_counts"
PERSONA: Final = "persona:"
PERSONAS: Final = "personas:"
REPORT_REQUESTS: Final = "report_generation_requests"
REPORT_RESPONSES: Final = "report_generation_responses"
REPORT_REQUEST: Final = "report_request:"
REPORT_REPLY: Final = "report_reply:"
REPORT_COUNTS: Final = "report_counts"
REPORT: Final = "report:"
REPORT_MAKING: Final = "report_making:"
INPUT: Final = "input:"
USER: Final = "user:"
USER_DATA: Final = "user_data:"
QUEUES: Final = "queues:"
DELIVERY_QUEUE: Final = "message_queue:"
INCOMING_QUEUE: Final = "webhook_queue"
INCOMING_STAGE: Final = "incoming"
DELIVERY: Final = "delivery:"
TOLD: Final = "told:"
PROVIDER: Final = "provider:"
TELEGRAM: Final = "telegram:"
TELEGRAM_AT: Final = "telegram_at:"
API_KEY_NAME: Final = "name:"
"""What a field of that hash begins with where it leads from a name to a digest."""

CANCEL_CHANNEL: Final = "job:cancelled"
"""Pub/sub: ids of running jobs to stop. A hint: the mark in the live record is the truth."""
WAKE_CHANNEL: Final = "llm:wake"
"""Pub/sub: an entry was added, or a slot was freed while one waited. A hint: a slow poll stands behind it."""
CHAT_CHANNEL: Final = "chat:told"
"""Pub/sub: chats that have a new event. A hint: a slow poll stands behind it."""

LUA_KEYS: Final = {
    "completion": COMPLETION,
    "delayed": DELAYED,
    "staged": STAGED,
    "entering": ENTERING,
    "promoting": PROMOTING,
    "dead": DEAD,
    "live_index": LIVE_INDEX,
    "stamp": STAMP,
    "live": LIVE,
    "worker": WORKER,
    "workers": WORKERS,
    "gateways": GATEWAYS,
    "replicas": REPLICAS,
    "load": LOAD,
    "leases": LEASES,
    "running": RUNNING,
    "health": HEALTH,
    "events": EVENTS,
    "rows": ROWS,
    "api_keys": API_KEYS,
    "message": MESSAGE,
    "batch": BATCH,
    "batch_members": BATCH_MEMBERS,
    "batch_done": BATCH_DONE,
    "queue": QUEUE,
    "chat_queue": CHAT_QUEUE,
    "chat_lock": CHAT_LOCK,
    "chat": CHAT,
    "chat_open": CHAT_OPEN,
    "chat_seen": CHAT_SEEN,
    "chat_turns": CHAT_TURNS,
    "chat_events": CHAT_EVENTS,
    "chat_image": CHAT_IMAGE,
    "chat_counts": CHAT_COUNTS,
    "chat_channel": CHAT_CHANNEL,
    "persona": PERSONA,
    "personas": PERSONAS,
    "queues": QUEUES,
    "api_key_name": API_KEY_NAME,
    "report_requests": REPORT_REQUESTS,
    "report_responses": REPORT_RESPONSES,
    "report_request": REPORT_REQUEST,
    "report_reply": REPORT_REPLY,
    "report_counts": REPORT_COUNTS,
    "report": REPORT,
    "report_making": REPORT_MAKING,
    "input": INPUT,
    "user": USER,
    "user_data": USER_DATA,
    "delivery_queue": DELIVERY_QUEUE,
    "incoming_queue": INCOMING_QUEUE,
    "incoming_stage": INCOMING_STAGE,
    "delivery": DELIVERY,
    "told": TOLD,
    "provider": PROVIDER,
    "cancel_channel": CANCEL_CHANNEL,
    "wake_channel": WAKE_CHANNEL,
    "placed": "job:llm_in",
    "placed_group": "llm",
    "telling": "webhook",
}
"""What scripts know as `KEY`. `placed` begins the streams whose entries wait for a replica's slot, `placed_group` reads
them. `telling` is the flow whose outcome tells its story (`Flow.story`) whatever the end."""

BOUNDED: Final = {
    "job:*_in": "unfinished work, bounded by admission",
    "job:*_in:high": "unfinished work, bounded by admission",
    "job:*_in:low": "unfinished work, bounded by admission",
    DELIVERY_QUEUE + "*": "unfinished work, bounded by admission",
    INCOMING_QUEUE + "*": "unfinished work, bounded by admission",
    DELIVERY + "*": "one per unfinished delivery; once it has ended it has a TTL",
    DELAYED: "unfinished work, bounded by admission",
    STAGED: "batches being accepted; what rests for a minute is taken away",
    ENTERING: "open batches, bounded by admission",
    DEAD: "capped by count and age",
    LIVE_INDEX: "one member per live job, and per staged member of a batch",
    STAMP: "one number",
    LIVE + "*": "one per live job, and per staged member of a batch",
    IN_FLIGHT + "*": "one member per live job",
    WORKERS: "one member per process, dropped when it is gone",
    REPLICAS: "one field per replica",
    LOAD + "*": "one per replica",
    LEASES + "*": "one member per live job",
    RUNNING + "*": "one member per running call",
    EVENTS: "events not yet written, bounded by admission",
    ROWS + "*": "one per event that names it, and per batch being accepted",
    API_KEYS: "two fields per key that an operator made",
    BATCH + "*": "open batches and those being accepted, bounded by admission; a closed one has a TTL",
    PERSONA + "*": "one per persona that was set up, bounded by a setting",
    PERSONAS + "*": "one member per persona",
    CHAT_COUNTS: "two numbers",
    REPORT_REQUESTS: "what other back ends ask for and no worker has taken yet",
    REPORT_RESPONSES: "capped by count and age",
    REPORT_COUNTS: "two numbers",
    QUEUE + "*": "one per queue that was set up, or that signs webhooks, bounded by a setting",
    QUEUES + "*": "one member per queue",
}
"""Keys without a TTL (as glob patterns), each with the reason why it is bounded."""


DELIVERY_STAGES: Final = ("sms", "mms", "email")
"""What can be delivered; each is a stage of its own."""


def stream(stage: str, priority: Priority = "normal") -> str:
    """Return the stream a stage reads for *priority*."""
    if stage in DELIVERY_STAGES:
        name = DELIVERY_QUEUE + stage
    else:
        name = INCOMING_QUEUE if stage == INCOMING_STAGE else f"job:{stage}_in"
    return name if priority == "normal" else f"{name}:{priority}"


def stage_of(name: str) -> str:
    """Return the stage that reads a stream; its group bears the same name. (`group_of` is this for scripts.)"""
    name = name.removesuffix(":high").removesuffix(":low")
    if name == INCOMING_QUEUE:
        return INCOMING_STAGE
    return name.removeprefix(DELIVERY_QUEUE).removeprefix("job:").removesuffix("_in")


def of_tenant(tenant: str, name: str) -> str:
    """Return *name*, which a client has chosen, as it stands in keys: no other tenant's name can be the same.

    The default tenant's stand there as they are, unless they could be taken for those of a tenant.
    """
    return name if tenant == DEFAULT_TENANT and ":" not in name else f"{tenant}:{name}"


def normalise_replica_url(text: str) -> tuple[str, int | None]:
    """Return a replica's address in its one spelling, and its slots where `?slots=N` names them.

    Scheme and host in lower case, default port and trailing slash dropped.

    Raises:
        ValueError: not an http(s) address, or slots out of 1..4096.
    """
    text = text.strip()
    if any(character <= " " or character == "\x7f" for character in text):
        raise ValueError(f"{text!r}: a replica's address holds no spaces")
    parts = urlsplit(text)
    if parts.scheme.lower() not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{text!r} is not an http:// or https:// address")
    if parts.username or parts.password:
        raise ValueError("a replica's address must not hold a password: it becomes a key and a metric label")
    query = parse_qs(parts.query, keep_blank_values=True)
    slots_text = query.pop("slots", [None])[-1]
    if query or parts.fragment:
        raise ValueError(f"{text!r}: only ?slots=N may follow a replica's address")
    slots = None
    if slots_text is not None:
        if not slots_text.isdigit() or not 1 <= int(slots_text) <= 4096:
            raise ValueError(f"{text!r}: slots must be a number from 1 to 4096")
        slots = int(slots_text)
    scheme = parts.scheme.lower()
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = parts.port
    if port is not None and port != {"http": 80, "https": 443}[scheme]:
        host = f"{host}:{port}"
    return urlunsplit((scheme, host, parts.path.rstrip("/"), "", "")), slots
