-- What scripts share: each is sent with the paragraphs whose names it uses, so a name and what it needs stand in one, or
-- in order. `KEY.<name>` is replaced by the spelling in keys.py.
-- Rules: no pcall around a write (it would hide half of one); no cjson on envelopes (it turns [] into {} and rounds long
-- numbers); everything is checked before the first write, since a script that fails half-way keeps what it wrote.

local call = redis.call

-- Redis' clock in microseconds; the same all through one script.
local function clock_us()
  local time = call('TIME')
  return time[1] * 1000000 + time[2]
end

-- A number as digits: tostring would write 1.7e+15.
local function digits(number)
  return string.format('%.0f', number)
end

-- The id of an envelope of ours, nil for anything else.
local function id_of(data)
  return data and string.match(data, '^{"v":1,"id":"([^"]+)"')
end

local function field_of(fields, name)
  for i = 1, #fields, 2 do
    if fields[i] == name then return fields[i + 1] end
  end
  return nil
end

-- Whether an entry waits for a place at a replica. What cannot be looked at is taken to wait: a wake-up too many is
-- better than one too few.
local function somebody_waits()
  for _, suffix in ipairs({'', ':high', ':low'}) do
    local stream = KEY.placed .. suffix
    local length = redis.pcall('XLEN', stream)
    if type(length) ~= 'number' then return true end
    if length > 0 then
      local in_hand = redis.pcall('XPENDING', stream, KEY.placed_group)
      if in_hand.err or length > in_hand[1] then return true end
    end
  end
  return false
end

-- What is said once per script call, at its end: a wake-up, when an entry was added to a placed stage, or one of its slots
-- was freed and an entry waits for one; to each gateway the jobs of its that have ended, with short outcomes; the stamp
-- that was given last.
local wake, freed, told, last_stamp = false, false, {}, nil
local function conclude()
  if wake or (freed and somebody_waits()) then call('PUBLISH', KEY.wake_channel, '') end
  for reply, ended in pairs(told) do call('XADD', reply, 'NOMKSTREAM', 'MAXLEN', '~', 10000, '*', unpack(ended)) end
  if last_stamp then call('SET', KEY.stamp, digits(last_stamp)) end
end

local function add(stream, data, vector)
  if string.sub(stream, 1, #KEY.placed) == KEY.placed then wake = true end
  if vector and vector ~= '' then
    return call('XADD', stream, '*', 'data', data, 'vector', vector)
  end
  return call('XADD', stream, '*', 'data', data)
end

-- Stop before the first write when a key is of another type than the script is going to need. Each key is asked once:
-- what a script makes of a key that was missing is what it asked for.
local types = {}
local function has_type(key, wanted)
  local found = types[key]
  if not found then
    found = call('TYPE', key).ok
    types[key] = found
  end
  return found == wanted or found == 'none', found
end
local function check_type(key, wanted)
  local right, found = has_type(key, wanted)
  if not right then error(key .. ' is a ' .. found .. ' and should be a ' .. wanted) end
end

-- The live record, fields by name; nil when there is none. Every key it names is of the right type: `finish` may go on.
local function read_live(id)
  local entry, stream, tenant, lease, cancel, reply, in_flight, idem, attempts, record, body =
    unpack(call('HMGET', KEY.live .. id, 'entry', 'stream', 'tenant', 'lease', 'cancel', 'reply', 'in_flight', 'idem',
      'attempts', 'record', 'body'))
  if not stream then return nil end
  local live = {
    entry = entry, stream = stream, tenant = tenant, lease = lease, cancel = cancel, reply = reply,
    in_flight = in_flight, idem = idem, attempts = attempts, record = record, body = body,
  }
  if live.lease then
    check_type(KEY.leases .. live.lease, 'zset')
    check_type(KEY.running .. live.lease, 'zset')
  end
  if live.in_flight then check_type(live.in_flight, 'set') end
  if live.idem then check_type(live.idem, 'hash') end
  if live.reply then check_type(live.reply, 'stream') end
  if live.record then
    live.kind, live.batch = string.match(live.record, '^(%a+) ?(.*)$')
    if live.kind == 'batch' then live.batch = id end
    check_type(KEY.events, 'stream')
    if live.batch ~= '' then
      check_type(KEY.batch .. live.batch, 'hash')
      check_type(KEY.batch_done .. live.batch, 'set')
      check_type(KEY.delayed, 'zset')
    end
  end
  return live
end

-- llm:load:<URL> always equals the number of live leases: it is set from their count, never counted up or down.
local function set_load(url)
  call('SET', KEY.load .. url, call('ZCARD', KEY.leases .. url))
end

local function lease(id, url, now_us)
  call('ZADD', KEY.leases .. url, digits(now_us), id)
  set_load(url)
end

-- Give back a job's running place and its lease.
local function unlease(id, url)
  if not url then return end
  if call('ZREM', KEY.running .. url, id) == 1 then freed = true end
  if call('ZREM', KEY.leases .. url, id) == 1 then set_load(url) end
end

-- The pending row of an entry: owner and delivery count; nil when it is not pending or its group is gone.
local function pending(stream, group, entry)
  local rows = redis.pcall('XPENDING', stream, group, entry, entry, 1)
  if rows.err or #rows == 0 then return nil end
  return rows[1][2], rows[1][4]
end

local function remove(stream, group, ...)
  call('XACK', stream, group, ...)
  call('XDEL', stream, ...)
end

-- The group of a stream: the stage's name.
local function group_of(stream)
  return string.match(string.gsub(string.gsub(stream, ':high$', ''), ':low$', ''), '^job:(.+)_in$')
end

-- What the outcome of a flow that tells its story shows, of a job that ended while it waited for a retry: its state. Only
-- such flows are named here, whose state holds nothing else. What looks like a key inside a text is escaped there.
local STORY = '^{"v":1,"id":"[^"]+","accepted_us":%d+,"flow":"' .. KEY.telling .. '",.-,"state":({.*}),"timings_ms":{'
local function story(live)
  local state = live.body and string.match(live.body, STORY)
  return state and state ~= '{}' and state or 'null'
end

-- An outcome that no worker wrote: the job ended while it waited.
local function ended(id, live, status, code, message, now_us)
  return '{"id":"' .. id .. '","status":"' .. status .. '","tenant":"' .. (live.tenant or 'default')
    .. '","result":' .. story(live) .. ',"error":{"type":"' .. status .. '","code":"' .. code .. '","message":"' .. message
    .. '"},"worker":null,"replica":null,"attempts":' .. (live.attempts or '0') .. ',"timings_ms":{},"finished_us":'
    .. digits(now_us) .. '}'
end

-- remember: tell the recorder what was asked for (rank 0) or what became of it (a higher one); see records.py.
local function remember(kind, id, tenant, rank, now_us, data, rows)
  local at_ms = digits(math.floor(now_us / 1000))
  local event = {'kind', kind, 'id', id, 'tenant', tenant, 'rank', rank, 'at_ms', at_ms, 'data', data}
  if rows then
    event[#event + 1] = 'rows'
    event[#event + 1] = rows
  end
  call('XADD', KEY.events, '*', unpack(event))
end

-- How a batch stands: nil when there is none, or what its counters say it would be closed as.
local function read_batch(id)
  local found = call('HMGET', KEY.batch .. id, 'req.count', 'res.count', 'failed.count', 'cancelled.count', 'cancel',
    'closed_ms', 'keep_ms', 'deadline_ms', 'tenant')
  if not found[1] then return nil end
  local function count(number) return tonumber(found[number] or '') or 0 end -- a stranger may have written no number
  local batch = {
    wanted = count(1), ended = count(2), failed = count(3), cancelled = count(4), cancel = found[5], closed = found[6],
    keep_ms = count(7), deadline_ms = count(8), tenant = found[9] or 'default',
  }
  if batch.cancelled > 0 and (batch.cancel or batch.cancelled == batch.wanted) then
    batch.verdict = 'cancelled'
  elseif batch.failed > 0 or batch.ended < batch.wanted then
    batch.verdict = 'completed_with_errors'
  else
    batch.verdict = 'completed'
  end
  return batch
end

-- A member of a batch has ended: keep its result, and count it once; the last one makes the batch's own job due. A closed
-- batch does not change any more. The result outlives the batch's own job, which gathers it.
local function count_member(id, batch_id, completion, ttl_ms, now_us)
  local now_ms = math.floor(now_us / 1000)
  local batch, key = read_batch(batch_id), KEY.batch .. batch_id
  if batch then ttl_ms = math.max(batch.keep_ms, batch.deadline_ms - now_ms) end
  local text = string.sub(completion, 1, -2) .. ',"batch_id":"' .. batch_id .. '"}'
  call('SET', KEY.message .. id, text, 'PX', digits(ttl_ms))
  if not batch or batch.closed or call('SADD', KEY.batch_done .. batch_id, id) == 0 then return end
  local status = string.match(completion, '^{"id":"[^"]*","status":"(%a+)"')
  if status ~= 'completed' then call('HINCRBY', key, 'failed.count', 1) end
  if status == 'cancelled' then call('HINCRBY', key, 'cancelled.count', 1) end
  if call('HINCRBY', key, 'res.count', 1) >= batch.wanted then
    call('ZADD', KEY.delayed, 'XX', digits(now_ms), batch_id)
  end
end

-- A batch's own job has ended, and with it the batch: what is left of it goes in its time.
local function close_batch(id, ttl_ms, now_us)
  local batch, key, now_ms = read_batch(id), KEY.batch .. id, digits(math.floor(now_us / 1000))
  if batch and batch.closed then return end
  if batch then
    ttl_ms = digits(batch.keep_ms)
    call('HSET', key, 'status', batch.verdict, 'closed_ms', now_ms)
    remember('batch', id, batch.tenant, 10, now_us, '{"status":"' .. batch.verdict .. '","response_count":' .. batch.ended
      .. ',"failed_count":' .. batch.failed .. ',"closed_ms":' .. now_ms .. '}')
  end
  for _, name in ipairs({key, KEY.batch_members .. id, KEY.batch_done .. id}) do call('PEXPIRE', name, ttl_ms) end
end

-- What follows from the end of a job that is remembered.
local function record_end(id, live, completion, ttl_ms)
  local now_us = clock_us()
  if live.kind == 'message' then count_member(id, live.batch, completion, ttl_ms, now_us) end
  if live.kind == 'batch' then
    close_batch(id, ttl_ms, now_us)
  else
    remember(live.kind, id, live.tenant or 'default', 10, now_us, completion)
  end
end

-- finish: the one place where a job ends. The caller has just removed its entry, in this same script.
local function finish(id, live, completion, ttl_ms)
  call('SET', KEY.completion .. id, completion, 'PX', ttl_ms)
  call('DEL', KEY.live .. id)
  call('ZREM', KEY.live_index, id)
  unlease(id, live.lease)
  if live.in_flight then call('SREM', live.in_flight, id) end
  if live.idem and call('EXISTS', live.idem) == 1 then call('HSET', live.idem, 'outcome', completion) end
  if live.reply then
    local jobs = told[live.reply] or {}
    jobs[#jobs + 1] = id
    jobs[#jobs + 1] = #completion <= 4096 and completion or '' -- a longer one is better fetched than kept twice
    told[live.reply] = jobs
  end
  if live.record then record_end(id, live, completion, ttl_ms) end
end

-- A stamp that rises with every accepted job, also when Redis' clock is set back: the larger of clock and last + 1.
local function next_stamp(now_us)
  last_stamp = last_stamp or tonumber(call('GET', KEY.stamp) or '0')
  last_stamp = math.max(now_us, last_stamp + 1)
  return last_stamp
end

-- Before the first write of a script that accepts jobs, besides the type of their streams.
local function check_accept()
  check_type(KEY.stamp, 'string')
  check_type(KEY.live_index, 'zset')
  check_type(KEY.delayed, 'zset')
end

local function envelope(id, tail, now_us)
  return '{"v":1,"id":"' .. id .. '","accepted_us":' .. digits(next_stamp(now_us)) .. ',' .. tail
end

-- accept: the one place where a job begins: its live record and its entry, or its place among the delayed.
-- tail: the envelope without `v`, `id` and `accepted_us`. more: further fields of the live record, flat.
local function accept(id, tail, stream, tenant, deadline_ms, due_ms, now_us, more, vector)
  local data = envelope(id, tail, now_us)
  local key = KEY.live .. id
  call('ZADD', KEY.live_index, deadline_ms, id)
  if tonumber(due_ms) * 1000 > now_us then
    call('HSET', key, 'stream', stream, 'entry', '', 'tenant', tenant, 'body', data, 'vector', vector or '', unpack(more))
    call('ZADD', KEY.delayed, due_ms, id)
  else
    call('HSET', key, 'stream', stream, 'entry', add(stream, data, vector), 'tenant', tenant, unpack(more))
  end
end

-- Whether a job that begins is remembered: `record` is '' or its kind, a blank, and what was asked for (JSON).
local function note_record(more, id, tenant, record, now_us)
  if record == '' then return end
  local kind, data = string.match(record, '^(%a+) (.*)$')
  more[#more + 1] = 'record'
  more[#more + 1] = kind
  remember(kind, id, tenant, 0, now_us, data)
end

-- A queue that is to have a record: whether its tenant may have it. A queue that is there already always may.
-- most: queues of one tenant, '' for any number.
local function enrol_queue(queue, most)
  local names = KEY.queues .. (string.match(queue, '^(.+):[^:]*$') or 'default')
  check_type(names, 'set')
  if call('SISMEMBER', names, queue) == 1 then return true end
  if most ~= '' and call('SCARD', names) >= tonumber(most) then return false end
  call('SADD', names, queue)
  return true
end

-- bury: write the story of an entry; returns how many old letters had to go.
local function bury(letter, most, max_age_ms, now_us)
  call('XADD', KEY.dead, '*', 'data', letter)
  local dropped = call('XTRIM', KEY.dead, 'MAXLEN', most)
  return dropped + call('XTRIM', KEY.dead, 'MINID', digits(math.floor(now_us / 1000) - max_age_ms))
end
