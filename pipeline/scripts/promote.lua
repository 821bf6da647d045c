#!lua flags=allow-oom
-- promote: move delayed jobs whose time has come, and members of batches just committed, onto their streams.
-- ARGV[1] at most (jobs)  ARGV[2] who calls  ARGV[3] life of a turn (ms)
-- Returns: time (us), jobs moved, jobs put off for a second because a key they need is of a wrong type, 1 when there is more
--   for who has called, else 0.
-- Invariant: a delayed job is either in job:delayed or on its stream, never both, never neither. A delivery that was
--   scheduled is pending from here on, and counts as in flight. A member of a batch enters once, in its order: its stream,
--   or job:delayed when it is due later; one that has ended before does not. Where there is much to do, one caller does
--   all of it, portion by portion, as long as it goes on: Redis serves others in between.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local most, moved, put_off = tonumber(ARGV[1]), 0, 0
local ids = call('ZRANGEBYSCORE', KEY.delayed, '-inf', digits(now_ms), 'LIMIT', 0, most)
local batch = has_type(KEY.entering, 'zset') and call('ZRANGEBYSCORE', KEY.entering, '-inf', digits(now_ms), 'LIMIT', 0, 1)[1]
local more = (#ids == most or batch) and 1 or 0
if more == 1 then
  check_type(KEY.promoting, 'string')
  local other = call('GET', KEY.promoting)
  if other and other ~= ARGV[2] then return {digits(now_us), 0, 0, 0} end
  call('SET', KEY.promoting, ARGV[2], 'PX', ARGV[3])
end

-- Much is due at once: a fifth of it is what came last, unless that is a member, which has its order.
if #ids == most then
  local at = most
  for _, id in ipairs(call('ZREVRANGEBYSCORE', KEY.delayed, digits(now_ms), '-inf', 'LIMIT', 0, math.ceil(most / 5))) do
    local record = redis.pcall('HGET', KEY.live .. id, 'record') -- a key of a wrong type is put off below
    if type(record) ~= 'string' or not string.find(record, '^message ') then
      ids[at] = id
      at = at - 1
    end
  end
end

local function onto_stream(id, stream, body, vector)
  local key = KEY.live .. id
  call('HSET', key, 'entry', add(stream, body, vector))
  call('HDEL', key, 'body', 'vector')
  moved = moved + 1
end

for _, id in ipairs(ids) do
  local key = KEY.live .. id
  local live = redis.pcall('HMGET', key, 'stream', 'body', 'vector', 'record', 'in_flight')
  local is_delivery = live[4] == 'delivery'
  local fits = not live.err and (not live[2] or (has_type(live[1], 'stream')
    and (not is_delivery or (has_type(KEY.events, 'stream') and has_type(KEY.delivery .. id, 'hash')
      and (not live[5] or has_type(live[5], 'set'))))))
  if not fits then
    call('ZADD', KEY.delayed, digits(now_ms + 1000), id)
    put_off = put_off + 1
  else
    if live[2] then
      onto_stream(id, live[1], live[2], live[3])
      if is_delivery and live[5] then call('SADD', live[5], id) end
      local delivery = is_delivery and read_delivery(id)
      if delivery then raise_delivery(id, delivery, 'pending', '', now_us) end -- a retried one stands higher
    end
    call('ZREM', KEY.delayed, id)
  end
end

-- All members of a batch are for one stream. One that is no longer as it was staged has ended, or is a stranger's.
local function enter(at_most)
  local key, members = KEY.batch .. batch, KEY.batch_members .. batch
  if not (has_type(key, 'hash') and has_type(members, 'list')) then return false end
  local about = call('HMGET', key, 'entered', 'due_ms')
  local entered, due_ms, later = tonumber(about[1] or ''), tonumber(about[2] or ''), {}
  local found = entered and due_ms and call('LRANGE', members, entered, entered + at_most - 1) or {} -- else: it is gone
  for i, id in ipairs(found) do
    local live = redis.pcall('HMGET', KEY.live .. id, 'entry', 'stream', 'body')
    if live[1] == '' and live[3] then
      if not has_type(live[2], 'stream') then return false end
      local at_ms = due_ms + (entered + i - 1) / 1000
      if at_ms > now_ms then -- not before those ahead of it, which may be among the delayed
        later[#later + 1] = string.format('%.3f', at_ms)
        later[#later + 1] = id
      else
        onto_stream(id, live[2], live[3])
      end
    end
  end
  if #later > 0 then call('ZADD', KEY.delayed, unpack(later)) end
  if #found == at_most then
    call('HSET', key, 'entered', entered + at_most)
  else
    call('HDEL', key, 'entered', 'due_ms')
    call('ZREM', KEY.entering, batch)
  end
  return true
end

if batch and #ids < most and not enter(most - #ids) then
  call('ZADD', KEY.entering, digits(now_ms + 1000), batch)
  put_off = put_off + 1
end
conclude()
return {digits(now_us), moved, put_off, more}
