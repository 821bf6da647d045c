#!lua flags=allow-oom
-- promote: move delayed jobs whose time has come onto their streams.
-- ARGV[1] at most (jobs)
-- Returns: time (us), jobs moved, jobs put off for a second because a key they need is of a wrong type.
-- Invariant: a delayed job is either in job:delayed or on its stream, never both, never neither. A delivery that was
--   scheduled is pending from here on, and counts as in flight.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local moved, put_off = 0, 0
for _, id in ipairs(call('ZRANGEBYSCORE', KEY.delayed, '-inf', digits(now_ms), 'LIMIT', 0, ARGV[1])) do
  local key = KEY.live .. id
  local live = call('HMGET', key, 'stream', 'body', 'vector', 'record', 'in_flight')
  local is_delivery = live[4] == 'delivery'
  local fits = not live[2] or (has_type(live[1], 'stream')
    and (not is_delivery or (has_type(KEY.events, 'stream') and has_type(KEY.delivery .. id, 'hash')
      and (not live[5] or has_type(live[5], 'set')))))
  if not fits then
    call('ZADD', KEY.delayed, digits(now_ms + 1000), id)
    put_off = put_off + 1
  else
    if live[2] then
      call('HSET', key, 'entry', add(live[1], live[2], live[3]))
      call('HDEL', key, 'body', 'vector')
      if is_delivery and live[5] then call('SADD', live[5], id) end
      local delivery = is_delivery and read_delivery(id)
      if delivery then raise_delivery(id, delivery, 'pending', '', now_us) end -- a retried one stands higher
      moved = moved + 1
    end
    call('ZREM', KEY.delayed, id)
  end
end
conclude()
return {digits(now_us), moved, put_off}
