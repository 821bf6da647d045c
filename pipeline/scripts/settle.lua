#!lua flags=allow-oom
-- settle: let go of entries: each with one outcome, checked, acknowledged and carried on in this one step.
-- ARGV[1] consumer  ARGV[2] life of a completion (ms)  ARGV[3] dead letters at most  ARGV[4] their greatest age (ms)
-- ARGV[5] 'placed' when the stage holds running places, else ''  ARGV[6] group
-- then per entry 9 values: stream, entry, delivery count, job id, verb, and a, b, c of the verb, and the number of jobs
--   to start, followed by 7 values for each of these: id, tail, stream, tenant, deadline_ms, due_ms, record (see prelude)
--   forward: a next stream, b envelope, c vector     complete: a completion
--   retry:   a delay (ms),  b envelope, c vector     release:  b envelope, c vector
--   bury:    a completion ('' none), b dead letter
-- Returns: time (us), dead letters dropped, then per entry: 'settled' | 'cancelled' (the job was to be cancelled and ended
--   so) | 'lost' (another owner, or another delivery) | 'orphan' (no live record names this entry: only bury is done).
-- Invariant: an entry is acknowledged and deleted exactly when its outcome is written, by its owner of this delivery.
--   Entries are removed last, all together: should the script ever fail half-way, none has gone without its outcome.
local now_us = clock_us()
local consumer, ttl_ms, placed, group = ARGV[1], ARGV[2], ARGV[5] == 'placed', ARGV[6]
local ANSWERS, FIRST, SIZE, START = 2, 7, 9, 7
local answers, records, at = {digits(now_us), 0}, {}, FIRST

local spans = {} -- by stream: the first and the last of the batch's entries, and how many
while at <= #ARGV do
  local record = {
    stream = ARGV[at], entry = ARGV[at + 1], count = tonumber(ARGV[at + 2]), id = ARGV[at + 3], verb = ARGV[at + 4],
    a = ARGV[at + 5], b = ARGV[at + 6], c = ARGV[at + 7], starts = at + SIZE,
  }
  at = at + SIZE + START * tonumber(ARGV[at + SIZE - 1])
  record.ends = at - 1
  records[#records + 1] = record
  local span = spans[record.stream] or {first = record.entry, size = 0}
  span.last, span.size = record.entry, span.size + 1
  spans[record.stream] = span
end

-- Entries of a batch mostly lie side by side: then one look shows them all. What it does not show is looked up by itself.
local held = {}
for stream, span in pairs(spans) do
  held[stream] = {}
  local rows = span.size > 1 and redis.pcall('XPENDING', stream, group, span.first, span.last, span.size, consumer) or {}
  for _, row in ipairs(rows) do held[stream][row[1]] = row[4] end
end
local function is_ours(record)
  local owner, count = consumer, held[record.stream][record.entry]
  if not count then owner, count = pending(record.stream, group, record.entry) end
  return owner == consumer and count == record.count
end

-- What is needed of the live record of a job that only moves on, as nearly all do: a third of it.
local function read_lightly(id)
  local entry, lease, cancel, attempts = unpack(call('HMGET', KEY.live .. id, 'entry', 'lease', 'cancel', 'attempts'))
  if not entry or lease or cancel then return read_live(id) end
  return {entry = entry, attempts = attempts}
end

local function check(record)
  local read = record.verb == 'forward' and read_lightly or read_live
  record.live = record.id ~= '' and read(record.id) or nil
  record.named = record.live and record.live.entry == record.entry
  if not record.named and record.verb ~= 'bury' then record.answer = 'orphan' end
  if record.verb == 'forward' then check_type(record.a, 'stream') end
  if record.verb == 'retry' then check_type(KEY.delayed, 'zset') end
  for i = record.starts, record.ends, START do
    check_accept()
    check_type(ARGV[i + 2], 'stream')
    if ARGV[i + 6] ~= '' then check_type(KEY.events, 'stream') end
  end
end
check_type(KEY.dead, 'stream')
check_type(KEY.live_index, 'zset')
for _, record in ipairs(records) do
  if is_ours(record) then check(record) else record.answer = 'lost' end
end

local gone = {}
local function lets_go(record)
  local entries = gone[record.stream] or {}
  entries[#entries + 1] = record.entry
  gone[record.stream] = entries
end

-- Whether the holder of a delivery says by this that its provider has not taken it. A retry does, unless the end of a
-- hand-over was never told: then the job's state says so (stages/delivery.py).
local function tells(record)
  if record.verb == 'retry' then return not string.find(record.b, '"untold":true', 1, true) end
  if record.verb ~= 'bury' or record.a == '' then return false end
  local outcome = cjson.decode(record.a)
  return outcome.status == 'failed' and outcome.error.code ~= 'outcome_unknown'
end

local function settle(record)
  local id, live, key = record.id, record.live, KEY.live .. record.id
  lets_go(record)
  if record.named and live.kind == 'delivery' and tells(record) then clear_doubt(id, record.entry, record.count) end
  if record.verb == 'bury' then
    if not (record.named and is_forgotten(live.report)) then -- else the letter would tell of somebody who was erased
      answers[2] = answers[2] + bury(record.b, ARGV[3], tonumber(ARGV[4]), now_us)
    end
    if record.named and record.a ~= '' then
      finish(id, live, record.a, ttl_ms)
    elseif id ~= '' and record.a ~= '' and call('EXISTS', key) == 0 then -- now: a batch mate may have begun it
      call('SET', KEY.completion .. id, record.a, 'PX', ttl_ms, 'NX') -- a sender's own broken entry: tell the sender
    end
    return 'settled'
  end
  if live.cancel and record.verb ~= 'complete' then
    live.body = record.b -- what it would have gone on with
    finish(id, live, ended(id, live, 'cancelled', 'cancelled', 'the job was cancelled', now_us), ttl_ms)
    return 'cancelled'
  end
  if record.verb == 'forward' then
    if placed and live.lease then
      unlease(id, live.lease)
      call('HDEL', key, 'lease')
    end
    if live.attempts then call('HDEL', key, 'attempts') end
    call('HSET', key, 'stream', record.a, 'entry', add(record.a, record.b, record.c))
  elseif record.verb == 'complete' then
    finish(id, live, record.a, ttl_ms)
  else
    if live.lease then
      unlease(id, live.lease)
      call('HDEL', key, 'lease')
    end
    local attempts = tonumber(string.match(record.b, '"attempt":(%d+)') or '1') - 1
    if record.verb == 'retry' then
      local due_ms = math.floor(now_us / 1000) + tonumber(record.a)
      call('HSET', key, 'attempts', attempts, 'stream', record.stream, 'entry', '', 'body', record.b, 'vector', record.c)
      call('ZADD', KEY.delayed, digits(due_ms), id)
    else
      call('HSET', key, 'attempts', attempts, 'entry', add(record.stream, record.b, record.c))
    end
  end
  for i = record.starts, record.ends, START do
    local new = ARGV[i]
    if call('EXISTS', KEY.live .. new, KEY.completion .. new) == 0 then
      local more = {'deadline', ARGV[i + 4]}
      note_record(more, new, ARGV[i + 3], ARGV[i + 6], now_us)
      accept(new, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], now_us, more)
    end
  end
  return 'settled'
end

for number, record in ipairs(records) do
  answers[ANSWERS + number] = record.answer or settle(record)
end
for stream, entries in pairs(gone) do remove(stream, group, unpack(entries)) end
conclude()
return answers
