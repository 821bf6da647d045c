#!lua flags=allow-oom
-- settle: let go of entries: each with one outcome, checked, acknowledged and carried on in this one step.
-- ARGV[1] consumer  ARGV[2] life of a completion (ms)  ARGV[3] dead letters at most  ARGV[4] their greatest age (ms)
-- ARGV[5] 'placed' when the stage holds running places, else ''
-- then per entry 10 values: stream, group, entry, delivery count, job id, verb, and a, b, c of the verb, and the number
--   of jobs to start, followed by 6 values for each of these: id, tail, stream, tenant, deadline_ms, due_ms
--   forward: a next stream, b envelope, c vector     complete: a completion
--   retry:   a delay (ms),  b envelope, c vector     release:  b envelope, c vector
--   bury:    a completion ('' none), b dead letter
-- Returns: time (us), dead letters dropped, then per entry: 'settled' | 'cancelled' (the job was to be cancelled and ended
--   so) | 'lost' (another owner, or another delivery) | 'orphan' (no live record names this entry: only bury is done).
-- Invariant: an entry is acknowledged and deleted exactly when its outcome is written, by its owner of this delivery.
local now_us = clock_us()
local consumer, ttl_ms, placed = ARGV[1], ARGV[2], ARGV[5] == 'placed'
local ANSWERS = 2
local answers, records, at = {digits(now_us), 0}, {}, 6

check_type(KEY.dead, 'stream')
check_accept()

while at <= #ARGV do
  local record = {
    stream = ARGV[at], group = ARGV[at + 1], entry = ARGV[at + 2], count = tonumber(ARGV[at + 3]), id = ARGV[at + 4],
    verb = ARGV[at + 5], a = ARGV[at + 6], b = ARGV[at + 7], c = ARGV[at + 8], starts = at + 10,
  }
  at = at + 10 + 6 * tonumber(ARGV[at + 9])
  record.ends = at - 1
  local owner, count = pending(record.stream, record.group, record.entry)
  if owner ~= consumer or count ~= record.count then
    record.answer = 'lost'
  else
    record.live = record.id ~= '' and read_live(record.id) or nil
    record.named = record.live and record.live.entry == record.entry
    if not record.named and record.verb ~= 'bury' then record.answer = 'orphan' end
    if record.verb == 'forward' then check_type(record.a, 'stream') end
    for i = record.starts, record.ends, 6 do check_type(ARGV[i + 2], 'stream') end
  end
  records[#records + 1] = record
end

local function end_cancelled(record)
  remove(record.stream, record.group, record.entry)
  local text = ended(record.id, record.live, 'cancelled', 'cancelled', 'the job was cancelled', now_us)
  finish(record.id, record.live, text, ttl_ms)
  return 'cancelled'
end

local function settle(record)
  local id, live, key = record.id, record.live, KEY.live .. record.id
  if record.verb == 'bury' then
    remove(record.stream, record.group, record.entry)
    answers[2] = answers[2] + bury(record.b, ARGV[3], tonumber(ARGV[4]), now_us)
    if record.named and record.a ~= '' then
      finish(id, live, record.a, ttl_ms)
    elseif id ~= '' and record.a ~= '' and call('EXISTS', key) == 0 then -- now: a batch mate may have begun it
      call('SET', KEY.completion .. id, record.a, 'PX', ttl_ms, 'NX') -- a sender's own broken entry: tell the sender
    end
    return 'settled'
  end
  if live.cancel and record.verb ~= 'complete' then return end_cancelled(record) end
  remove(record.stream, record.group, record.entry)
  if record.verb == 'forward' then
    if placed then
      unlease(id, live.lease)
      call('HDEL', key, 'lease')
    end
    if live.attempts then call('HDEL', key, 'attempts') end
    call('HSET', key, 'stream', record.a, 'entry', add(record.a, record.b, record.c))
  elseif record.verb == 'complete' then
    finish(id, live, record.a, ttl_ms)
  else
    unlease(id, live.lease)
    call('HDEL', key, 'lease')
    call('HSET', key, 'attempts', tonumber(string.match(record.b, '"attempt":(%d+)') or '1') - 1)
    if record.verb == 'retry' then
      local due_ms = math.floor(now_us / 1000) + tonumber(record.a)
      call('HSET', key, 'stream', record.stream, 'entry', '', 'body', record.b, 'vector', record.c)
      call('ZADD', KEY.delayed, digits(due_ms), id)
    else
      call('HSET', key, 'entry', add(record.stream, record.b, record.c))
    end
  end
  for i = record.starts, record.ends, 6 do
    local new = ARGV[i]
    if call('EXISTS', KEY.live .. new, KEY.completion .. new) == 0 then
      accept(new, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], now_us, {'deadline', ARGV[i + 4]})
    end
  end
  return 'settled'
end

for number, record in ipairs(records) do
  answers[ANSWERS + number] = record.answer or settle(record)
end
tell_wake()
return answers
