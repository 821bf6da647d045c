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

-- Before the first write of a script that accepts jobs, besides the type of their streams.
local function check_accept()
  check_type(KEY.stamp, 'string')
  check_type(KEY.live_index, 'zset')
  check_type(KEY.delayed, 'zset')
end

-- Before the first write of a script that ends, or begins, a chat's run: whatever it leads to may be written.
local function check_chat(key)
  check_accept()
  check_type(KEY.events, 'stream')
  check_type(KEY.chat_counts, 'hash')
  check_type(KEY.chat .. key, 'hash')
  check_type(KEY.chat_queue .. key, 'list')
  check_type(KEY.chat_lock .. key, 'string')
  check_type(KEY.chat_open .. key, 'hash')
  check_type(KEY.chat_turns .. key, 'list')
  check_type(KEY.chat_events .. key, 'stream')
  local stream = call('HGET', KEY.chat .. key, 'stream')
  if stream then check_type(stream, 'stream') end
end

-- What the live record of a report says besides its kind: when it was accepted, for how long its response is kept and how
-- many there may be, for how long the report may serve others and its inputs are a person's last ones, the epoch of that
-- person, the person as keys name them, and the request that waits for a response ('-' none).
local REPORT = '^report (%d+) (%d+) (%d+) (%d+) (%d+) (%x+) (%S+) (%S+)$'
local function read_report(text)
  local at_ms, keep_ms, most, cache_ms, input_ms, epoch, owner, request = string.match(text, REPORT)
  if not at_ms then return nil end
  for key, wanted in pairs({
    [KEY.report_responses] = 'stream', [KEY.report_counts] = 'hash', [KEY.user .. owner] = 'hash',
    [KEY.user_data .. owner] = 'zset',
  }) do check_type(key, wanted) end
  return {
    at_ms = at_ms, keep_ms = keep_ms, most = most, cache_ms = cache_ms, input_ms = input_ms, epoch = epoch, owner = owner,
    request = request,
  }
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
    if live.kind == 'chat' then
      live.chat, live.batch = live.batch, ''
      check_chat(live.chat)
    end
    check_type(KEY.events, 'stream')
    if live.kind == 'delivery' then check_type(KEY.delivery .. id, 'hash') end
    if live.kind == 'report' then
      live.report, live.batch = read_report(live.record), ''
    elseif live.batch ~= '' then
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

-- The group of a stream: the stage's name (`stage_of` in keys.py).
local function group_of(stream)
  local name = string.gsub(string.gsub(stream, ':high$', ''), ':low$', '')
  if name == KEY.incoming_queue then return KEY.incoming_stage end
  if string.sub(name, 1, #KEY.delivery_queue) == KEY.delivery_queue then return string.sub(name, #KEY.delivery_queue + 1) end
  return string.match(name, '^job:(.+)_in$')
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

-- A stamp that rises with every accepted job, also when Redis' clock is set back: the larger of clock and last + 1.
local function next_stamp(now_us)
  last_stamp = last_stamp or tonumber(call('GET', KEY.stamp) or '0')
  last_stamp = math.max(now_us, last_stamp + 1)
  return last_stamp
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

-- A chat: what scripts need of it; nil when nobody has spoken there, or all of it has gone in its time.
local function read_chat(key)
  local found = call('HMGET', KEY.chat .. key, 'epoch', 'id', 'tenant', 'keep_ms', 'tail', 'stream', 'life_ms',
    'in_flight', 'taken', 'seq', 'queue_ms')
  if not found[2] then return nil end
  return {
    epoch = found[1], id = found[2], tenant = found[3], keep_ms = found[4], tail = found[5], stream = found[6],
    life_ms = found[7], in_flight = found[8], taken = tonumber(found[9] or '0'), seq = tonumber(found[10] or '0'),
    queue_ms = tonumber(found[11] or '0'),
  }
end

-- The id and the instant (ms) of what stands in a chat's queue; nil of what is no message at all.
local function message_of(element)
  return string.match(element, '^{"message_id":"([^"]+)",.*"at_ms":(%d+)}$')
end

-- The id of a message that was said, as it stands in a chat's queue. What was not said, or said otherwise, is none: it
-- may look like one and be broken inside, and nothing would ever take it out of the queue.
local function said_id(key, element)
  local id = message_of(element)
  return id and call('HGET', KEY.chat_open .. key, id) == element and id
end

-- The run that holds a chat's lock; nil when none does.
local function holder_of(key)
  local lock = call('GET', KEY.chat_lock .. key)
  return lock and string.match(lock, '^(.+):%d+$')
end

-- A chat's event for those who watch it. `more`: what follows in its JSON.
local function tell_chat(key, chat, kind, more, now_us)
  local text = '{"type":"' .. kind .. '","chat_id":"' .. chat.id .. '","epoch":' .. chat.epoch .. ',' .. more
    .. ',"at_ms":' .. digits(math.floor(now_us / 1000)) .. '}'
  local stream = KEY.chat_events .. key
  call('XADD', stream, 'MAXLEN', '~', 1000, '*', 'data', text)
  call('PEXPIRE', stream, chat.keep_ms)
  call('PUBLISH', KEY.chat_channel, key)
end

-- The next number among the turns of a chat: it rises also when the chat was forgotten in between.
local function next_turn(key, chat, now_us)
  chat.seq = math.max(now_us, chat.seq + 1)
  call('HSET', KEY.chat .. key, 'seq', digits(chat.seq))
  return chat.seq
end

-- A turn as history has it: an array of its id and its columns.
local function turn_row(chat, seq, role, element, more)
  return '["' .. chat.id .. '/' .. digits(seq) .. '",' .. string.sub(element, 1, -2) .. ',"role":"' .. role
    .. '","chat_id":"' .. chat.id .. '","epoch":' .. chat.epoch .. ',"seq":' .. digits(seq) .. ',' .. more .. '}]'
end

-- history is told of a chat by one event: the chat, and in it what was said.
local function remember_chat(chat, rows, now_us)
  local data = '{"epoch":' .. chat.epoch .. ',"rows":[' .. table.concat(rows, ',') .. ']}'
  remember('chat', chat.id, chat.tenant, digits(chat.seq), now_us, data)
end

-- These messages (as they stood in the queue) get another end than an answer.
local function end_messages(key, chat, elements, kind, error_text, now_us)
  local ids, rows = {}, {}
  for _, element in ipairs(elements) do
    local id = said_id(key, element)
    if id then
      ids[#ids + 1] = '"' .. id .. '"'
      call('HDEL', KEY.chat_open .. key, id)
      local more = '"status":"' .. kind .. '","is_processed":false'
      rows[#rows + 1] = turn_row(chat, next_turn(key, chat, now_us), 'user', element, more)
    end
  end
  if #ids == 0 then return 0 end
  if kind ~= 'cleared' then call('HINCRBY', KEY.chat_counts, kind, #ids) end -- who clears counts himself
  local more = '"message_ids":[' .. table.concat(ids, ',') .. '],"error":' .. error_text
  tell_chat(key, chat, kind, more, now_us)
  remember_chat(chat, rows, now_us)
  return #ids
end

-- What was accepted and does not stand in the queue any more, which Redis, or a stranger, has dropped: it has expired.
local function end_vanished(key, chat, now_us)
  local open, queue = KEY.chat_open .. key, KEY.chat_queue .. key
  if call('HLEN', open) <= call('LLEN', queue) then return 0 end
  local waits, gone, fields = {}, {}, call('HGETALL', open)
  for _, element in ipairs(call('LRANGE', queue, 0, -1)) do waits[message_of(element) or ''] = true end
  for i = 1, #fields, 2 do
    if not waits[fields[i]] then gone[#gone + 1] = fields[i + 1] end
  end
  table.sort(gone, function(a, b)
    local _, at_a = message_of(a)
    local _, at_b = message_of(b)
    return tonumber(at_a or '0') < tonumber(at_b or '0')
  end)
  call('HDEL', KEY.chat .. key, 'taken') -- what stands in front now was taken by nobody
  chat.taken = 0
  local text = '{"type":"expired","code":"queue_expired","message":"the message waited too long to be answered"}'
  return end_messages(key, chat, gone, 'expired', text, now_us)
end

-- Begin a run of a chat, and with it take the lock, which outlives the run's deadline.
local function start_run(key, chat, id, now_us)
  local deadline_ms = digits(math.floor(now_us / 1000) + chat.life_ms)
  local tail = string.gsub(chat.tail, '"deadline_ms":0,', '"deadline_ms":' .. deadline_ms .. ',', 1)
  tail = string.gsub(tail, '"at_us":0,', '"at_us":' .. digits(now_us) .. ',', 1)
  tail = string.gsub(tail, '"epoch":0}', '"epoch":' .. chat.epoch .. '}', 1)
  call('SET', KEY.chat_lock .. key, id .. ':' .. chat.epoch, 'PX', digits(chat.life_ms + 60000))
  call('PEXPIRE', KEY.chat_queue .. key, digits(chat.queue_ms))
  call('HDEL', KEY.chat .. key, 'taken')
  local more = {'deadline', deadline_ms, 'record', 'chat ' .. key}
  if chat.in_flight ~= '' then
    call('SADD', chat.in_flight, id)
    more[#more + 1] = 'in_flight'
    more[#more + 1] = chat.in_flight
  end
  accept(id, tail, chat.stream, chat.tenant, deadline_ms, 0, now_us, more)
end

-- A run has ended, however: it lets go of the lock, and what still waits gets the next run, or its outcome. A run that
-- lost the lock to another changes nothing; one whose lock has lapsed leaves its messages to the next run.
local function end_run(id, live, completion, now_us)
  local key, holder = live.chat, holder_of(live.chat)
  if holder and holder ~= id then return end
  local chat, queue = read_chat(key), KEY.chat_queue .. key
  call('DEL', KEY.chat_lock .. key)
  if not chat then return end
  local status = string.match(completion, '^{"id":"[^"]*","status":"(%a+)"')
  if holder and status ~= 'completed' then
    local text = string.match(completion, '"error":({.-}),"worker":') or 'null'
    local kind = status == 'expired' and 'expired' or 'failed'
    local most = chat.taken
    -- It failed before it had any: the next run would meet the same, and the one after it.
    if status == 'failed' and call('HGET', KEY.chat .. key, 'began') ~= id then most = call('LLEN', queue) end
    if most > 0 then
      local taken = call('LRANGE', queue, 0, most - 1)
      call('LTRIM', queue, most, -1)
      end_messages(key, chat, taken, kind, text, now_us)
    end
    local old = {}
    for _, element in ipairs(call('LRANGE', queue, 0, -1)) do
      local _, at_ms = message_of(element)
      if not at_ms or tonumber(at_ms) + chat.queue_ms >= now_us / 1000 then break end
      old[#old + 1] = element
    end
    if #old > 0 then
      call('LTRIM', queue, #old, -1)
      end_messages(key, chat, old, 'expired', text, now_us)
    end
  end
  end_vanished(key, chat, now_us)
  if call('LLEN', queue) > 0 then
    start_run(key, chat, string.sub(redis.sha1hex(id .. digits(now_us)), 1, 32), now_us)
  end
end

-- Answer a report's request, once: an entry of the responses, those that are too old or too many go, and the request's
-- id is known for as long as the response is kept. `text`: the response without its braces and its request.
local function respond(request, text, keep_ms, most, now_us)
  local entry = call('XADD', KEY.report_responses, '*', 'data', '{"request_id":"' .. request .. '",' .. text .. '}')
  call('SET', KEY.report_request .. request, entry, 'PX', keep_ms)
  call('XTRIM', KEY.report_responses, 'MINID', digits(math.floor(now_us / 1000) - tonumber(keep_ms)))
  local dropped = call('XTRIM', KEY.report_responses, 'MAXLEN', most)
  if dropped > 0 then call('HINCRBY', KEY.report_counts, 'dropped', dropped) end
  return entry
end

-- Keep where a bridge wants the response to a request, for as long as that may be there. More than 4,096 bytes are none of
-- a bridge's (`bridge.py`), and are not kept.
local function keep_reply(request, reply, for_ms)
  if request ~= '' and reply ~= '' and #reply <= 4096 then call('SET', KEY.report_reply .. request, reply, 'PX', for_ms) end
end

-- What is kept of a person, by kind and name, until it goes by itself, so that it can be found when it is to be erased.
local function keep_of_person(owner, kind, name, ms, now_us)
  local key, now_ms = KEY.user_data .. owner, math.floor(now_us / 1000)
  call('ZADD', key, 'GT', digits(now_ms + ms), kind .. ' ' .. name)
  call('ZREMRANGEBYSCORE', key, '-inf', '(' .. digits(now_ms))
  if call('PTTL', key) < ms then call('PEXPIRE', key, digits(ms)) end
end

-- Whether a person's data were erased after this report about them was asked for.
local function is_forgotten(report)
  return report ~= nil and call('HGET', KEY.user .. report.owner, 'epoch') ~= report.epoch
end

-- What a report's outcome says when its person was erased meanwhile: nothing of them.
local function forgotten(id, live)
  return ended(id, live, 'failed', 'user_deleted', 'the data of this user were deleted before the report was finished',
    clock_us())
end

-- The life of a report's completion: nobody waits for one with an open connection.
local REPORT_SHOWN_MS = 3600000

-- A report has ended: it is kept for who asks the same, its request is answered, and history is told.
local function end_report(id, live, completion)
  local report, now_us = live.report, clock_us()
  local result = string.match(completion,
    '^{"id":"[^"]*","status":"completed","tenant":"[^"]*","result":({.*}),"error":null,"worker":')
  local cached, hash, text = string.match(result or '', '^{"cached":(%a+),"hash":"([^"]*)","report":({.*})}$')
  local code, message = string.match(completion, '"error":{"type":"[^"]*","code":"([^"]*)","message":"(.*)"},"worker":')
  local worker = string.match(completion, '^.*,"worker":("[^"]*"),"replica":') or 'null'
  local said = text and '"status":"success"' or '"status":"error"'
  said = said .. ',"report_id":"' .. id .. '","report":' .. (text or 'null') .. ',"cached":' .. (cached or 'false')
    .. ',"error_message":' .. (text and 'null' or '"' .. (code or 'failed') .. ': ' .. (message or '') .. '"')
    .. ',"worker":' .. worker .. ',"duration_ms":'
    .. digits(math.max(0, math.floor(now_us / 1000) - tonumber(report.at_ms)))
  local entry = report.request ~= '-' and respond(report.request, said, report.keep_ms, report.most, now_us)
  if is_forgotten(report) then return end
  keep_of_person(report.owner, 'job', id, REPORT_SHOWN_MS, now_us)
  if entry then keep_of_person(report.owner, 'response', entry, tonumber(report.keep_ms), now_us) end
  if cached == 'false' then call('SET', KEY.report .. hash, text, 'PX', report.cache_ms) end
  if cached then keep_of_person(report.owner, 'report', hash, tonumber(report.cache_ms), now_us) end
  local tenant = live.tenant or 'default'
  local user, prefix = report.owner, tenant .. ':'
  if string.sub(user, 1, #prefix) == prefix then user = string.sub(user, #prefix + 1) end
  remember('report', id, tenant, 10, now_us, '{"user_id":"' .. user .. '","epoch":"' .. report.epoch
    .. '","created_ms":' .. report.at_ms .. ',' .. string.sub(completion, 2))
end

-- The statuses of a delivery, by rank: a status only ever gives way to a higher one. `cancelled` stands above all, so that
-- nothing follows it, and is reached from below `sending` only.
local RANKS = {
  scheduled = 0, pending = 1, sending = 2, unknown = 3, sent = 4, undelivered = 5, failed = 6, delivered = 7, cancelled = 8,
}

-- A delivery: what scripts need of it; nil where there is none (any more), or where somebody has broken its record by hand.
local function read_delivery(id)
  local found = call('HMGET', KEY.delivery .. id, 'status', 'history', 'tenant', 'type', 'due_ms', 'keep_ms', 'doubt',
    'provider', 'provider_id', 'error', 'attempts', 'changes')
  if not (RANKS[found[1] or ''] and found[2] and found[3] and tonumber(found[6] or '')) then return nil end
  return {
    status = found[1], history = found[2], tenant = found[3], type = found[4], due_ms = found[5], keep_ms = found[6],
    doubt = found[7], provider = found[8], provider_id = found[9], error = found[10], attempts = found[11],
    changes = tonumber(found[12] or '0'),
  }
end

-- Write a delivery's record, and tell history how it stands now: as a whole, so that the last word is the only one needed.
local function write_delivery(id, delivery, now_us)
  local function text(value) return value and value ~= '' and cjson.encode(value) or 'null' end
  delivery.changes = delivery.changes + 1
  call('HSET', KEY.delivery .. id, 'status', delivery.status, 'history', delivery.history,
    'provider', delivery.provider or '', 'provider_id', delivery.provider_id or '', 'error', delivery.error or '',
    'attempts', delivery.attempts or '0', 'changes', delivery.changes)
  local error_text = delivery.error and delivery.error ~= '' and delivery.error or 'null'
  remember('delivery', id, delivery.tenant, delivery.changes, now_us, '{"status":"' .. delivery.status
    .. '","history":' .. delivery.history .. ',"provider":' .. text(delivery.provider) .. ',"provider_id":'
    .. text(delivery.provider_id) .. ',"error":' .. error_text .. ',"attempts":' .. (delivery.attempts or '0') .. '}')
end

-- A delivery in one of these has gone out, or never will: nobody needs what its attachments hold. One that has failed or
-- is unknown may be sent again by hand.
local IS_DONE = {sent = true, delivered = true, cancelled = true}

-- The one place where a delivery's status changes. error_text: JSON, '' none. Returns whether it did.
local function raise_delivery(id, delivery, status, error_text, now_us)
  if status == 'cancelled' and RANKS[delivery.status] >= RANKS.sending then return false end
  if RANKS[status] <= RANKS[delivery.status] then return false end
  delivery.status, delivery.error = status, error_text
  delivery.history = string.sub(delivery.history, 1, -2) .. ',["' .. status .. '",' .. digits(math.floor(now_us / 1000))
    .. ']]'
  write_delivery(id, delivery, now_us)
  if IS_DONE[status] then call('HDEL', KEY.delivery .. id, 'files') end
  return true
end

-- The mark (`doubt`) of who begins to hand a delivery over: this entry, in this holder's hands.
local function mark_of(entry, count) return entry .. ' ' .. count end

-- A holder says how its own hand-over went: its mark is taken away. That of somebody else stays: an heir that fails before
-- it has begun knows nothing of what the one before it did.
local function clear_doubt(id, entry, count)
  local key = KEY.delivery .. id
  if call('HGET', key, 'doubt') == mark_of(entry, count) then call('HDEL', key, 'doubt') end
end

-- A delivery's job has ended. What the provider itself has told weighs more than what the job found, and what was begun
-- (`doubt`) by somebody who never said how it went may have gone out. From here on the record has a time to live.
local function end_delivery(id, completion, now_us)
  local delivery, key = read_delivery(id), KEY.delivery .. id
  if not delivery then return end
  local outcome = cjson.decode(completion)
  local error_text = string.match(completion, '"error":({.*}),"worker":') or ''
  local is_taken = RANKS[delivery.status] >= RANKS.sent
  delivery.attempts = digits(outcome.attempts)
  if outcome.status == 'completed' then
    local provider_id = outcome.result.provider_id
    local is_new = type(provider_id) == 'string' and provider_id ~= delivery.provider_id
    if is_new then delivery.provider_id = provider_id end
    if not raise_delivery(id, delivery, 'sent', '', now_us) and is_new then write_delivery(id, delivery, now_us) end
    call('HDEL', key, 'files') -- also of one that was told `undelivered` before
  elseif delivery.doubt then
    raise_delivery(id, delivery, 'unknown', error_text, now_us)
  elseif not is_taken then
    raise_delivery(id, delivery, 'failed', error_text, now_us)
  end
  call('HDEL', key, 'doubt')
  call('PEXPIRE', key, delivery.keep_ms)
end

-- What follows from the end of a job that is remembered.
local function record_end(id, live, completion, ttl_ms)
  if live.report then return end_report(id, live, completion) end
  local now_us = clock_us()
  if live.kind == 'message' then count_member(id, live.batch, completion, ttl_ms, now_us) end
  if live.kind == 'batch' then
    close_batch(id, ttl_ms, now_us)
  elseif live.kind == 'chat' then
    end_run(id, live, completion, now_us)
  elseif live.kind == 'delivery' then
    end_delivery(id, completion, now_us)
  else
    remember(live.kind, id, live.tenant or 'default', 10, now_us, completion)
  end
end

-- finish: the one place where a job ends. The caller removes its entry in this same script: before this, or last of all.
local function finish(id, live, completion, ttl_ms)
  if live.report then
    if is_forgotten(live.report) then completion = forgotten(id, live) end
    ttl_ms = REPORT_SHOWN_MS
  end
  call('SET', KEY.completion .. id, completion, 'PX', ttl_ms)
  call('DEL', KEY.live .. id)
  call('ZREM', KEY.live_index, id)
  unlease(id, live.lease)
  if live.in_flight then call('SREM', live.in_flight, id) end
  if live.idem and not live.report and call('EXISTS', live.idem) == 1 then call('HSET', live.idem, 'outcome', completion) end
  if live.reply then
    local jobs = told[live.reply] or {}
    jobs[#jobs + 1] = id
    jobs[#jobs + 1] = #completion <= 4096 and completion or '' -- a longer one is better fetched than kept twice
    told[live.reply] = jobs
  end
  if live.record then record_end(id, live, completion, ttl_ms) end
end

-- Cancel a live job: end it where it waits; mark it where somebody has it in hand, and tell.
local function cancel_live(id, live, ttl_ms, now_us)
  local text = ended(id, live, 'cancelled', 'cancelled', 'the job was cancelled', now_us)
  if live.entry == '' then
    call('ZREM', KEY.delayed, id)
    finish(id, live, text, ttl_ms)
    return 'cancelled'
  end
  if pending(live.stream, group_of(live.stream), live.entry) then
    call('HSET', KEY.live .. id, 'cancel', '1')
    call('PUBLISH', KEY.cancel_channel, id)
    return 'cancelling'
  end
  call('XDEL', live.stream, live.entry)
  finish(id, live, text, ttl_ms)
  return 'cancelled'
end

-- Whether a job that begins is remembered: `record` is '' or what its live record says of that, its kind first, then a
-- blank and what was asked for (JSON). `more`: the job's deadline is among it. What was asked of a report is its person's
-- last input, unless they were erased since they were looked up.
local function note_record(more, id, tenant, record, now_us)
  if record == '' then return end
  local head, data = string.match(record, '^([^{]*) ({.*)$')
  more[#more + 1] = 'record'
  more[#more + 1] = head
  local report = read_report(head)
  if report and not is_forgotten(report) then
    local left_ms = tonumber(field_of(more, 'deadline')) - math.floor(now_us / 1000)
    keep_of_person(report.owner, 'job', id, math.max(0, left_ms) + REPORT_SHOWN_MS, now_us)
    call('SET', KEY.input .. report.owner, data, 'PX', report.input_ms)
  end
  remember(string.match(head, '^%a+'), id, tenant, 0, now_us, data)
end

-- A queue, or a persona, that is to have a record: whether its tenant may have it. One that is there already always may.
-- kind: beginning of the key that holds the names of a tenant's. most: so many of one tenant, '' for any number.
local function enrol(kind, name, most)
  local names = kind .. (string.match(name, '^(.+):[^:]*$') or 'default')
  check_type(names, 'set')
  if call('SISMEMBER', names, name) == 1 then return true end
  if most ~= '' and call('SCARD', names) >= tonumber(most) then return false end
  call('SADD', names, name)
  return true
end

-- bury: write the story of an entry; returns how many old letters had to go.
local function bury(letter, most, max_age_ms, now_us)
  call('XADD', KEY.dead, '*', 'data', letter)
  local dropped = call('XTRIM', KEY.dead, 'MAXLEN', most)
  return dropped + call('XTRIM', KEY.dead, 'MINID', digits(math.floor(now_us / 1000) - max_age_ms))
end
